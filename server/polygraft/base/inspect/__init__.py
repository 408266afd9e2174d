"""Finds out what a base model consists of."""
