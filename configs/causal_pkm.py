r"""A causal decoder with a product-key memory, after Lample et al. 2019: 16 layers, width 1024.

    python -m pkm_jax.pretrain --config=causal_pkm --config.data.corpus='/corpora/*.jsonl.xz'
    python -m pkm_jax.pretrain --config=causal_pkm:placement=replace,layers=4+8+12

Arguments: placement=none|replace|add (default add), layers=I+J+… (0-based, default 8).
From Lample et al., at second hand: learned positions, 16 attention heads, Adam with β2 = 0.98 at
2.5e-4, values at 1e-3; memories of 512² slots, 4 heads of 32 reads and batch norm of queries, in
the place of feed-forward layers (`placement=replace`). Ours: batch, steps, warmup, dropout,
clipping and weight decay, a rate that falls linearly (theirs by the inverse square root),
WordPiece. Their text, 28 billion words of news, is not public.
How long this takes and how it ends has not been measured: docs/scaling.md has what it needs on TPU
slices.
"""

import ml_collections

from pkm_jax.configuration.resolve import defaults
from pkm_jax.refusal import Refusal


def get_config(arguments: str = '') -> ml_collections.ConfigDict:
    given = {'placement': 'add', 'layers': '8'}
    for argument in filter(None, arguments.split(',')):
        name, _, value = argument.partition('=')
        if name not in given:
            raise Refusal(f'configs/causal_pkm.py: {argument!r} is none of placement=…, '
                          f'layers=I+J.')
        given[name] = value
    try:
        layers = tuple(map(int, given['layers'].split('+')))
    except ValueError:
        raise Refusal(f'configs/causal_pkm.py: layers={given["layers"]!r} must be numbers joined '
                      f'by +, such as 4+8.') from None

    config = defaults('causal', 'causal_lm')
    config.workdir = f'runs/causal_pkm_{given["placement"]}'
    config.model.update(layers=16, width=1024, attention_heads=16, feed_forward_width=4096,
                        max_length=512, positions='learned', attention_dropout=0.0,
                        norm_epsilon=1e-5, dtype='bfloat16')
    config.memory.update(placement=given['placement'],
                         layers=() if given['placement'] == 'none' else layers)
    config.train.update(steps=250_000, batch=512, warmup=4_000, learning_rate=2.5e-4,
                        values_learning_rate=1e-3, beta2=0.98)
    return config
