"""Triton kernels that several ops share."""
