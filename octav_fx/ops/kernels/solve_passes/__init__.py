"""The clip of a large tensor by Newton's steps, each a pass over the data by all programs."""
