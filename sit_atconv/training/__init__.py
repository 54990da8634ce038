"""What the training loop is made of, beside its objective: averages, guards, what is watched, what a run will need."""
