"""What a value row says: the words that the output head makes of it alone.

A linear lens: the row is taken as if it were the output of its layer, added to nothing, and goes
through the model's last norm and its head. Later layers, the residual stream that it is added to
in truth, and other rows read with it are left out: it shows where a row points, not what it does.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from pkm_jax.models.bert import Bert
from pkm_jax.models.causal import Causal
from pkm_jax.models.interface import at
from pkm_jax.prediction.trained import Trained

ROWS = 256      # at a time


def has_lens(trained: Trained) -> bool:
    """Whether the model has a head over words."""
    return 'mlm' in getattr(trained.config, 'output_heads', ('mlm',))


def words_of_rows(
    trained: Trained, layer: int, slots: Int[np.ndarray, 'n'], count: int,
) -> Int32[np.ndarray, 'n count']:
    """Ids of the `count` words that each row of the memory in that layer points to, best first."""
    program = jax.jit(functools.partial(
        _words, trained.graph, layer, count, len(trained.vocabulary.tokens)))
    table = at(trained.state[0], trained.config.memories[layer].table)
    found = []
    for first in range(0, len(slots), ROWS):
        chosen = np.resize(slots[first:first + ROWS], ROWS)     # repeated to one shape
        found.append(np.asarray(program(trained.state, table[chosen])))
    return np.concatenate(found)[:len(slots)] if found else np.zeros((0, count), np.int32)


def _words(
    graph: nnx.GraphDef, layer: int, count: int, words: int, state: tuple[dict, dict],
    rows: Float[Array, 'n V'],
) -> Int32[Array, 'n count']:
    model = nnx.merge(graph, *state)
    block = model.layers[layer]
    states = rows.astype(model.config.dtype)[None]
    if block.memory.output is not None:
        states = block.memory.output(states)
    if block.memory_scale is not None:      # of which a norm leaves the sign
        states = states * jnp.where(block.memory_scale[...] < 0, -1, 1).astype(states.dtype)
    if isinstance(model, Bert):
        logits = model.mlm(model.layers[-1].output_norm(states), model.embeddings.word)
    else:
        logits = cast(Causal, model).logits(model.norm(states))
    return jax.lax.top_k(logits[0, :, :words], count)[1]
