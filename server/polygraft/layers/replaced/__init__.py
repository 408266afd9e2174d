"""Norms, embeddings and heads with adapters' own weights."""
