"""Training by the paper's recipe: `recipes` says what, `corpus` on which text, `trainer` how."""
