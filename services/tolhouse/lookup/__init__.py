"""The lookup service: ids in, rows out, over a store."""
