"""Analysis of the content of rows, and of their effect on a model. No service imports it."""
