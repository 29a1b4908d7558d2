"""Training: what a run compiles, its step, loop, evaluation and log."""
