"""Polygraft: one base language model, many adapters of every kind, mixed in every step."""

__version__ = "0.1.0"
