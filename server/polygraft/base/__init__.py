"""Loading the base model, and what the rest must know of it."""
