"""From a checkpoint to a folder of samples: the job, its labels, drawing, the folder."""
