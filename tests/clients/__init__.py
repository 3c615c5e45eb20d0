"""Third-party clients against a running system, each installed apart from Tolhouse."""
