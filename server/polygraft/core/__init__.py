"""The nouns that every layer shares: requests, adapter weights and primitives, and what a base is made of."""
