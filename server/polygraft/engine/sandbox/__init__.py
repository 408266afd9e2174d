"""Processes of their own for what adapters bring along and nobody has checked: tokenizers and chat
templates."""
