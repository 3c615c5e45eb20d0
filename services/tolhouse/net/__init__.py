"""Communication between processes: TLS, credentials, servers, channels, DNS, health."""
