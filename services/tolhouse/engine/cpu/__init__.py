"""What makes the model fast on a CPU: packed matrices and compiled decode steps."""
