"""The machine's cores and memory, and how the server divides them."""
