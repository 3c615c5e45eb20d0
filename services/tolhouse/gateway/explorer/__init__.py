"""The explorer page at /explore: its data, its comparison of completions, and the page itself."""
