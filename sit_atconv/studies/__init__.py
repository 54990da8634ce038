"""Studies that run the other parts many times and report the results."""
