"""Checkpoints of runs, and pretrained weights to start from."""
