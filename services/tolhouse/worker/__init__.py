"""The attention worker. It receives token ids and generates token ids."""
