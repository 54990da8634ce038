"""Parts of the training loop: configuration, setup, averages, guards, logging and estimates."""
