"""Frozen image encoders, as evaluation and alignment use them."""
