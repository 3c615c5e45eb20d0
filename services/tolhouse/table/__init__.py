"""The table format in bytes, without torch or network code."""
