"""Tables at rest: the file store, the Redis store, and what is done with either."""
