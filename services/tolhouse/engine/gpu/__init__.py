"""Triton kernels for attention and for copying rows, which make the model fast on a GPU."""
