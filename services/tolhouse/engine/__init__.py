"""The engine: batches sequences, gets their rows, runs the model, samples."""
