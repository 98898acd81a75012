"""What the training libraries of others need of a quantized model, one file for each."""
