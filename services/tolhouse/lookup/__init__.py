"""The lookup service, which serves the rows of a store by token id."""
