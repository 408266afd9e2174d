"""Loading, checking, unloading and merging adapters between steps."""
