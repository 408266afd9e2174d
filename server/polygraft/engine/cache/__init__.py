"""The paged KV cache, its blocks, and what sequences share of it."""
