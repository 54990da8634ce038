"""Training state to resume from, and weights that record how to sample from them."""
