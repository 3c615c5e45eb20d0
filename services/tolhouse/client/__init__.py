"""The client SDK: rows from row sources, tokens from workers; without torch, ray or redis."""
