"""The clip of each row by one program, which holds the row: weights by channel, and small tensors."""
