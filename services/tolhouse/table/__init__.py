"""The table format, which processes must agree on to the byte; nothing of torch or networks."""
