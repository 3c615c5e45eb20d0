"""Analysis of what rows hold, and of what they cost or gain a model. No service uses it."""
