"""Packed matrices and compiled decode steps, which make the model fast on a CPU."""
