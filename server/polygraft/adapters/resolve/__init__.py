"""Completes adapter weights that depend on the base's own weights."""
