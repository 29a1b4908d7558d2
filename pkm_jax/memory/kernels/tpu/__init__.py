"""Kernels for TPUs (Pallas, Mosaic), with the signatures of the references that they replace.

Compiled for v4, v5e, v5p and v6e by the TPU's compiler and interpreted in tests; run on none yet.
"""
