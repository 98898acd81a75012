"""Methods that find the clip of a tensor, and the gradients beside them. Imports torch and nothing else."""
