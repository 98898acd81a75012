"""The clip of a large tensor from one pass over it: a histogram of the tail above a bound from the hint."""
