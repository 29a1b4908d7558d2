"""What the makers of GPUs and TPUs publish of them."""

from typing import NamedTuple

GIB = 2 ** 30
LANES, SUBLANES = 128, 8     # of a tile of 32-bit numbers, in which TPUs keep arrays


class Chip(NamedTuple):
    """Published numbers of one device; rates are peaks, per second."""
    memory: int         # bytes of HBM
    flops: float        # bfloat16, dense
    bandwidth: float    # bytes between HBM and the chip
    links: float        # bytes sent to other devices over all links (ICI, or NVLink)
    dimensions: int     # of the torus of a slice; 1: a TPU without one; 0: GPUs behind a switch
    network: float      # bytes sent to another slice or, of GPUs, to another host; 0: not known
    kinds: tuple[str, ...]      # what JAX calls such devices
    cores: int = 1      # devices that JAX makes of a chip: the other numbers are one's


# TPUs: cloud.google.com/tpu/docs/{v5e,v6e,v5p,v4,tpu7x}, which give links in both directions
# together, and the network of a pod or a chip in bits;
# those of v4 from Jouppi et al. 2023 (arXiv 2304.01433): 6 links of 50 GB/s. TPU 8: memory and its
# bandwidth from cloud.google.com/blog/products/compute/tpu-8t-and-tpu-8i-technical-deep-dive, links
# from blog.google/innovation-and-ai/infrastructure-and-cloud/google-cloud/eighth-generation-tpu-
# agentic-era (19.2 Tb/s of a chip, both directions), both of April 2026; as they give arithmetic in
# 4 bits alone, bfloat16 is from jax 0.12.0's jax/_src/tpu_info.py. An 8i is linked in Boardfly, no
# torus: as if every group of chips could use all links. GPUs: NVIDIA's data
# sheets of the SXM modules, half of what they give for both directions of NVLink, and one port a
# GPU of the DGX's network (400 Gb/s, A100: 200 Gb/s).
CHIPS = {
    'v5e': Chip(16 * GIB, 197e12, 819e9, 200e9, 2, 3.125e9, ('TPU v5 lite',)),
    'v6e': Chip(32 * GIB, 918e12, 1638e9, 400e9, 2, 12.5e9, ('TPU v6 lite',)),
    'v5p': Chip(95 * GIB, 459e12, 2765e9, 600e9, 3, 6.25e9, ('TPU v5',)),
    'v4': Chip(32 * GIB, 275e12, 1200e9, 300e9, 3, 0., ('TPU v4',)),
    'tpu7x': Chip(96 * GIB, 1153.5e12, 3690e9, 300e9, 3, 6.25e9, ('TPU7x',), cores=2),
    'tpu8t': Chip(216 * GIB, 996.1e12, 6528e9, 1200e9, 3, 0., ('TPU8t',)),
    'tpu8i': Chip(144 * GIB, 550.5e12, 4300.5e9, 600e9, 1, 0., ('TPU8i',), cores=2),
    'h200': Chip(141 * 10 ** 9, 989e12, 4.8e12, 450e9, 0, 50e9, ('NVIDIA H200',)),
    'h100': Chip(80 * 10 ** 9, 989e12, 3.35e12, 450e9, 0, 50e9, ('NVIDIA H100 80GB HBM3',)),
    'a100': Chip(80 * 10 ** 9, 312e12, 2.039e12, 300e9, 0, 25e9,
                 ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100-SXM4-40GB')),
}


def chip_of(kind: str) -> Chip | None:
    """What is published of a device that JAX calls so; None where it is not known."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


def peak_flops(kind: str) -> float | None:
    """Of one device of this kind in FLOP/s, bfloat16 and dense; None where it is not known."""
    chip = chip_of(kind)
    return chip.flops if chip else None
