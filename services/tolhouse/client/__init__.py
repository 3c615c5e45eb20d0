"""The client SDK: rows from lookup services, tokens from workers. Needs numpy and grpcio; never torch, ray or redis."""
