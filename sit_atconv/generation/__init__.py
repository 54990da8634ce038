"""Generation of a folder of samples from a checkpoint: job, labels, drawing, folder."""
