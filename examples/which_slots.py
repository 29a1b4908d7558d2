"""Which slots fired for which tokens, and how evenly they are used:
python examples/which_slots.py
"""

import jax
from flax import nnx

from pkm_jax import MemoryConfig, ProductKeyMemory, count_slots, no_counts, usage_metrics


def main() -> None:
    config = MemoryConfig(sub_keys=32, heads=2, top_k=4, query_width=32)
    memory = ProductKeyMemory(config, 64, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(0), (3, 50, 64))      # any leading shape
    real = jax.numpy.arange(50)[None] < jax.numpy.array([50, 20, 35])[:, None]

    _, reads = memory.read(states, real, deterministic=True)
    for token in range(3):
        for head in range(config.heads):
            best = ', '.join(f'{slot} ({weight:.2f})' for slot, weight in zip(
                reads.slots[token, head].tolist(), reads.weights[token, head].tolist()))
            print(f'token {token}, head {head}: slots {best}')

    counts = count_slots(no_counts(config.slots), reads, real.reshape(-1))
    metrics = usage_metrics(counts)
    print(f'{int(real.sum())} tokens use {metrics["top_k_usage"]:.1%} of {config.slots} slots, '
          f'{metrics["top_1_usage"]:.1%} as a best one; KL {metrics["kl"]:.2f} nats')


if __name__ == '__main__':
    main()
