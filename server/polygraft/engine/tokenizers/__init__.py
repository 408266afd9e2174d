"""Tokenizers and chat templates that adapters bring."""
