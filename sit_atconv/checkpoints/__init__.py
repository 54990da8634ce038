"""What a run leaves on disk: training state to resume from, and weights that say how to sample from them."""
