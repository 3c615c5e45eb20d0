"""The table format, byte for byte, without torch or network code."""
