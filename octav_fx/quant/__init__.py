"""Quantizer maths on plain tensors. Imports torch and nothing else."""
