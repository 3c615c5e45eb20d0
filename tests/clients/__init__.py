"""Third-party clients, each in its own environment, against a running system."""
