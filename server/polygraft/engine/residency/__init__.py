"""What is made of adapters between steps and kept: merged copies and linear combinations."""
