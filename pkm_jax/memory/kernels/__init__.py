"""Kernels of the memory by device, each in the place of a reference and with its arguments."""
