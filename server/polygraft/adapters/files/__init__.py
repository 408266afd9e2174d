"""Adapter folders on disk: opening, reading, checking, converting and refusing them."""
