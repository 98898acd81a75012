"""Launches of Triton kernels, remembered."""
