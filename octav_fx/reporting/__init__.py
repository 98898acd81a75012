"""What became of a model, for people to read."""
