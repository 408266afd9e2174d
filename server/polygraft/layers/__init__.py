"""What is put into the base's modules: side paths, attention over the paged cache, their operators."""
