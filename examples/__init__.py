"""What to copy: one readable file for each question, and the paper's recipes on ImageNet and SQuAD."""
