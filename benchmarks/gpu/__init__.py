"""What a GPU is asked by ./dev gpu: one file per question, a kernel's named after its op."""
