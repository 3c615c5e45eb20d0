"""The worker: takes token ids, generates token ids."""
