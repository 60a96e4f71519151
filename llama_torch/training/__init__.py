"""Training: the loop, its steps, and the run directory that it writes."""
