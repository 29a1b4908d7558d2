"""Place of the kernels for TPUs (Pallas, Mosaic); until there are any, a TPU runs plain XLA.

An operation gets a module with `forward`, `backward` and `unsupported`, as in `kernels/gpu`, and
`pkm_jax.dispatch` a lowering for the platform.
"""
