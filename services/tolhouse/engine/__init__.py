"""The engine, which batches sequences, reads their rows, runs the model and samples tokens."""
