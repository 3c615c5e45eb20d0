"""Source models: whatever computes the rows of token ids."""
