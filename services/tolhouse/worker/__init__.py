"""The attention worker: token ids in, token ids out; the rows of its FFNs come from the lookup service."""
