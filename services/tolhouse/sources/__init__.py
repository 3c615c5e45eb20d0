"""Source models, which compute rows from token ids."""
