"""What the documents say holds."""
