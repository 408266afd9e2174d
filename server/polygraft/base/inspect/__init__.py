"""Finds out what a base model is made of."""
