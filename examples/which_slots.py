"""Which slots of a memory fired for which tokens, and how much of it a text uses.

    python examples/which_slots.py

`memory.read` is a call that also says what it read: the slots [T, H, K] of each token and head in
descending order of score, and their weights, T being all tokens of the batch.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pkm_jax import MemoryConfig, ProductKeyMemory, count_slots, no_counts, usage_metrics

TEXT = ('the memory of the model has a key and a value for every slot '
        'and a token of the text reads the slots whose keys its query likes').split()
WIDTH = 32


def main() -> None:
    rngs = nnx.Rngs(0)
    words = sorted(set(TEXT))
    embed = nnx.Embed(len(words), WIDTH, rngs=rngs)
    memory = ProductKeyMemory(MemoryConfig(sub_keys=8, heads=2, top_k=3, query_width=16), WIDTH,
                              rngs=rngs)
    memory.eval()

    tokens = jnp.array([words.index(word) for word in TEXT]).reshape(2, -1)
    _, reads = memory.read(embed(tokens))
    print('word      best slot of head 0, weight    of head 1, weight')
    for word, slots, weights in list(zip(TEXT, reads.slots, reads.weights))[:6]:
        print(f'{word:10}' + '               '.join(
            f'{slot:3d}   {weight:.2f}' for slot, weight in zip(slots[:, 0], weights[:, 0])))

    slot, head = int(reads.slots[0, 0, 0]), 0
    readers = np.asarray((reads.slots[:, head] == slot).any(axis=-1))
    print(f'slot {slot} is read in head {head} by:',
          ', '.join(sorted({TEXT[token] for token in np.flatnonzero(readers)})))

    counts = count_slots(no_counts(memory.config.slots), reads, jnp.ones(len(TEXT), bool))
    usage = usage_metrics(counts)
    print(f'of {memory.config.slots} slots, {len(TEXT)} tokens read {usage["top_k_usage"]:.1%}, '
          f'{usage["top_1_usage"]:.1%} as some head\'s best; '
          f'half of the weight is on {usage["slots_50"]:.1%}')


if __name__ == '__main__':
    main()
