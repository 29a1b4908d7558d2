"""How much of a memory is used, over a fixed set of tokens (docs/method.md, section 4).

Counts are integers of two 32-bit words, mass too: of UNIT, so that it is added up exactly, in any
order. A weight is rounded to a UNIT, and one above 0 to no less than that. They hold for up to
2³⁴ reads of one slot with weight 1.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int32, UInt32

from pkm_jax.memory.layer import MemoryReads
from pkm_jax.mesh import Axes, axes_of, on_auto_axes, on_shards, shards_in_use, specs_of
from pkm_jax.refusal import Refusal

NEVER = jnp.iinfo(jnp.int32).min     # the step at which a slot not read so far was last read
UNIT_BITS = 30
UNIT = 2. ** -UNIT_BITS


class SlotCounts(NamedTuple):
    """What is counted of each of S slots, as integers of two 32-bit words, the low ones first."""
    #: how often a head read the slot
    selected: UInt32[Array, '2 S']
    #: how often it was the best slot of a head
    best: UInt32[Array, '2 S']
    #: sum of the weights with which it was read, z' of Lample et al. 2019
    mass: UInt32[Array, '2 S']


def no_counts(slots: int) -> SlotCounts:
    """Counts of zero for a table of so many slots."""
    return SlotCounts(*(jnp.zeros((2, slots), jnp.uint32) for _ in SlotCounts._fields))


def counts_spec(axes: Axes) -> P:
    """How each field of SlotCounts is split: by rows, as a table is."""
    return P(None, axes.table[0])


def count_slots(
    counts: SlotCounts, reads: MemoryReads, real: Bool[Array, '...'], *, axes: Axes | None = None,
) -> SlotCounts:
    """Adds the reads of the real tokens to `counts`, and returns the sum.

    `real` has one element for each token, in any shape, such as the mask that `read` was given:
    where it is False the token is padding, and is not counted.

    `axes`: see `pkm_jax.mesh.axes_of`. Each device counts the reads of its own tokens, in words
    of 4 bytes a slot, and keeps the sums of its own rows (`counts_spec`).

    Raises:
      Refusal: `real` has another number of elements, the counts are of a table of another size, or
      the mesh in use lacks one of the axes.
    """
    axes = axes_of(axes)[0]
    tokens, table_slots = len(reads.slots), counts.selected.shape[1]
    if real.size != tokens:
        raise Refusal(f'real {real.shape} for the reads of {tokens} tokens: it must have one '
                      f'element for each.')
    if reads.table_slots not in (None, table_slots):
        raise Refusal(f'Counts of {table_slots} slots for reads of a table of {reads.table_slots}: '
                      f'start from no_counts({reads.table_slots}).')

    def count(counts, slots, weights, real):
        of_device = functools.partial(_count, tokens=tokens, table_slots=table_slots, axes=axes)
        by_rows: Any = counts_spec(axes)    # in the places of arrays
        split = SlotCounts(by_rows, by_rows, by_rows)
        return on_shards(of_device, (split, *[axes.tokens] * 3), split, axes)(
            counts, slots, weights, real.reshape(-1))

    return on_auto_axes(count, specs_of(counts))(counts, reads.slots, reads.weights, real)


def _count(counts, slots, weights, real, *, tokens, table_slots, axes):
    """Counts of a device's own rows after the reads of all the `tokens`, of which it has some."""
    is_real = real[:, None, None]
    once = jnp.broadcast_to(is_real, slots.shape).astype(jnp.uint32)

    def add(words, slots, amounts, shift=0):
        return _add(words, slots, amounts, table_slots, axes, shift)

    mass = counts.mass
    for shift, digits in _digits(jnp.where(is_real, weights, 0), tokens):
        mass = add(mass, slots, digits, shift)
    return SlotCounts(add(counts.selected, slots, once),
                      add(counts.best, slots[:, :, 0], once[:, :, 0]), mass)


def _digits(weights, tokens):
    """Weights in UNITs as (place of the lowest bit, digits), lowest first.

    A slot has at most one read of each of the `tokens` and heads, so that sums of digits stay below
    2³².
    """
    bits = 32 - (tokens * weights.shape[1]).bit_length()
    units = jnp.round(weights * 2 ** UNIT_BITS).astype(jnp.uint32)
    units = jnp.maximum(units, (weights > 0).astype(jnp.uint32))
    for shift in range(0, UNIT_BITS, bits):
        last = shift + bits >= UNIT_BITS
        yield shift, units >> shift if last else (units >> shift) & (2 ** bits - 1)


def _add(words, slots, amounts, table_slots, axes, shift):
    """Two-word numbers of this device's rows with amounts · 2^shift of their slots added; sums must
    stay below 2³²."""
    low, high = words
    sums = _of_own_rows(jnp.zeros(table_slots, low.dtype).at[slots].add(amounts), axes)
    new = low + (sums << shift)
    carry = (new < low).astype(jnp.uint32) + (sums >> (32 - shift) if shift else 0)
    return jnp.stack([new, high + carry])


def _of_own_rows(sums, axes):
    """Numbers of all slots [S] summed over the devices, each keeping those of its rows."""
    shards = shards_in_use(axes)
    if shards.rows > 1:
        sums = jax.lax.psum_scatter(sums, axes.rows, tiled=True)
    if shards.data * shards.columns > 1:
        sums = jax.lax.psum(sums, (*axes.data, *axes.columns))
    return sums


def on_host(counts: Any) -> Any:
    """Counts, in any tree, as NumPy arrays.

    Where they are split over several processes all of these call it; then a word of one count at a
    time, so that no device holds more of them beside its own.
    """
    def whole(words):
        if not isinstance(words, jax.Array) or words.is_fully_addressable:
            return np.asarray(words)
        return np.stack([multihost_utils.process_allgather(words[place], tiled=True)
                         for place in range(len(words))])

    return jax.tree.map(whole, counts)


def host_counts(counts: SlotCounts) -> SlotCounts:
    """The counts as NumPy numbers [S]: selected and best int64, mass float64; see `on_host`.

    Fields that are numbers [S] already are taken as they are.
    """
    def numbers(field, dtype, unit):
        field = on_host(field)
        if field.ndim == 1:
            return field.astype(dtype)
        low, high = field.astype(dtype)
        return (low + high * dtype(2 ** 32)) * dtype(unit)

    return SlotCounts(numbers(counts.selected, np.int64, 1), numbers(counts.best, np.int64, 1),
                      numbers(counts.mass, np.float64, UNIT))


@jax.jit
def used_shares(counts: SlotCounts) -> tuple[Array, Array]:
    """top_1_usage and top_k_usage of `usage_metrics`, on the device."""
    return (jnp.mean(jnp.any(counts.best > 0, axis=0)), jnp.mean(jnp.any(counts.mass > 0, axis=0)))


def mark_selected(
    last_selected: Int32[Array, 'S'], reads: MemoryReads, real: Bool[Array, 'T'],
    step: Int32[Array, ''],
) -> Int32[Array, 'S']:
    """The training step at which each slot was last read by a real token, or NEVER."""
    when = jnp.where(real[:, None, None], step, NEVER)
    return last_selected.at[reads.slots].max(jnp.broadcast_to(when, reads.slots.shape))


def uniform_ceiling(slots: int, tokens: int, heads: int, picks: int = 1) -> float:
    """Expected share of slots reached when every head picks `picks` distinct ones uniformly.

    1 − (1 − picks / S)^(T·H): with one pick, the ceiling of top-1 usage.
    """
    return -math.expm1(tokens * heads * math.log1p(-picks / slots)) if slots > picks else 1.0


def usage_metrics(counts: SlotCounts) -> dict[str, float]:
    """How much of a memory is used, and how evenly (docs/method.md, section 4).

    * top_1_usage: share of the S slots that are the best of some head for at least one token;
    * top_k_usage: share of the slots that were read with a weight above 0;
    * kl: log S + Σ z log z in nats, z being a slot's share of the mass; 0 where all slots are
      alike, log S where one has everything;
    * gini: inequality of z, within [0, 1];
    * slots_50, slots_90, slots_99: the smallest share of slots that holds so many % of the mass.

    `counts` are those of `count_slots`, or of `host_counts`. All shares grow with the tokens.

    Raises:
      Refusal: nothing was counted.
    """
    counts = host_counts(counts)
    mass = np.sort(counts.mass)[::-1]
    if not mass.sum() > 0:
        raise Refusal('No real token was counted: memory usage needs at least one.')
    z, slots = mass / mass.sum(), mass.size
    used = z[z > 0]
    cumulated = np.cumsum(z)
    metrics = {
        'top_k_usage': used.size / slots,
        'top_1_usage': float(np.mean(counts.best > 0)),
        'kl': float(np.log(slots) + np.sum(used * np.log(used))),
        'gini': float((2 * cumulated.sum() - slots - 1) / slots),
    }
    for percent in (50, 90, 99):
        held = np.searchsorted(cumulated, percent / 100 - 1e-12) + 1
        metrics[f'slots_{percent}'] = float(held / slots)
    return metrics
