"""What the long recipes share: the training loop, its checkpoint, processes, samplers, the command line."""
