"""Linear products with adapters' side paths, and merging."""
