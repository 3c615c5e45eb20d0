"""Stores of tables: the file store, the Redis store, and operations on both."""
