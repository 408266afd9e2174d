"""Loading, unloading and merging adapters between steps."""
