"""What a row holds. Reads checkpoints; serves nobody."""
