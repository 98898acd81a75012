"""One file for each format that a deployed model can be written in."""
