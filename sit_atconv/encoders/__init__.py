"""Frozen image encoders for evaluation and alignment."""
