"""The table format: what three processes must agree on to the byte. Needs numpy; knows nothing of torch or networks."""
