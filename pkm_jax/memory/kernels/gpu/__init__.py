"""For NVIDIA GPUs (Pallas, Triton backend); imported only where a program for one is lowered."""
