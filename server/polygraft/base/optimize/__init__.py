"""Packs a base model's weights and fuses its modules."""
