"""Training with the paper's recipe: `recipes` are the settings, `corpus` the text."""
