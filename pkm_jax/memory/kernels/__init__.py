"""Kernels of the memory by device, each in the place of a reference and with its arguments."""

GPU_COLUMNS = 128       # of a table: those for NVIDIA GPUs read multiples of it alone
