"""The client SDK: rows from row sources, and tokens from workers, without torch, ray or redis."""
