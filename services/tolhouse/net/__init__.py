"""How processes talk: TLS, credentials, servers, channels, names, health."""
