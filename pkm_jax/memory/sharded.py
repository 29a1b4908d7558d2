"""Retrieval, read and value rows over the mesh in use (`jax.set_mesh`), as on one device.

Tokens and tables are split by the axes of the mesh that `axes` names (`pkm_jax.mesh`). The devices
of a memory group exchange the slots and weights of their tokens, each reads what it holds for all
of them, and the partial reads go back to the tokens' owners. Codebooks are replicated. Never
gathered: a table, its gradient, its optimiser state.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pkm_jax.dispatch import Implementation
from pkm_jax.memory import embedding_bag as bag
from pkm_jax.memory import product_keys, sparse_rows
from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.memory.sparse_rows import SparseRows, Touched, in_place
from pkm_jax.mesh import (
    OWN,
    Axes,
    axes_of,
    explicit_axes,
    on_auto_axes,
    on_shards,
    over_tokens,
    shards_in_use,
)
from pkm_jax.refusal import Refusal


def top_k_product_keys(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'], k: int, *,
    axes: Axes = OWN, implementation: Implementation | None = None,
) -> tuple[Float[Array, 'T H {k}'], Int32[Array, 'T H {k}']]:
    """`product_keys.top_k_product_keys`, each device searching for its own tokens."""
    search = functools.partial(product_keys.top_k_product_keys, k=k, implementation=implementation)
    return over_tokens(search, 1, axes)(query, codebooks)


def embedding_bag(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    dtype: DTypeLike | None = None, *,
    axes: Axes = OWN, implementation: Implementation | None = None,
) -> Float[Array, 'T V']:
    """`embedding_bag.embedding_bag` of the values rounded to `dtype`; their gradient is dense, and
    split as they are. Each device's is rounded to `dtype`; the sum over replicas is in the values'
    own."""
    def read(values, slots, weights):
        values = values.astype(dtype or values.dtype)
        partial = _read_own(values, _gather(slots, axes.memory), _gather(weights, axes.memory),
                            axes, implementation)
        return _to_owners(partial, axes)

    return on_shards(read, (axes.table, axes.tokens, axes.tokens), axes.tokens, axes)(
        values, slots, weights)


def embedding_lookup(
    table: Float[Array, 'rows V'], ids: Int32[Array, 'T'], *,
    axes: Axes = OWN, implementation: Implementation | None = None,
) -> Float[Array, 'T V']:
    """Rows of a table that every device has, as an `embedding_bag` of one read a token."""
    def read(ids, table):
        return bag.embedding_bag(table, ids[:, None], jnp.ones((len(ids), 1)),
                                 implementation=implementation)

    return over_tokens(read, 1, axes)(ids, table)


def sparse_embedding_bag(
    values: Float[Array, 'S V'], delta: Float[Array, 'rows V'], slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'], *,
    axes: Axes | None = None, implementation: Implementation | None = None,
) -> tuple[Float[Array, 'T V'], Touched]:
    """`embedding_bag` with a compact gradient; returns also the rows that it touched.

    `values` are a constant of the derivative. Row i of the gradient of `delta`, which are the zeros
    of `no_delta` for T · R reads, is that of row `ids[i]` of the table, as if the read were
    Σ w · (values[slot] + delta[place of slot]), in the dtype of `delta`. Reads of weight 0 touch
    nothing. `axes`: see `pkm_jax.mesh.axes_of`.

    Raises:
      Refusal: the mesh in use lacks one of the axes, XLA would have to split a kernel, or the
        implementation cannot take these arrays.
    """
    axes, implementation = resolve(axes, implementation)
    typed = explicit_axes(axes)
    tokens = typed.tokens if axes.names else P(jax.typeof(slots).sharding.spec[0])
    rows: Any = P(typed.table[0])   # specs in the places of arrays

    def read(values, delta, slots, weights):
        return _sparse_bag(values, delta, slots, weights, axes, implementation, delta.dtype)

    return on_auto_axes(read, (tokens, Touched(rows, rows)))(values, delta, slots, weights)


def resolve(
    axes: Axes | None, implementation: Implementation | None,
) -> tuple[Axes, Implementation | None]:
    """The axes that split arrays in the mesh in use, and what runs there.

    Raises:
      Refusal: the mesh lacks one of the axes, or XLA would have to split a kernel.
    """
    axes, partitioned = axes_of(axes)
    if partitioned and implementation in ('gpu', 'tpu'):
        raise Refusal(f'implementation = {implementation!r} in a mesh that XLA partitions: it '
                      f'cannot split a kernel. Name the axes of the mesh: axes=Axes(data, rows, '
                      f'columns).')
    return axes, 'xla' if partitioned else implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sparse_bag(values, delta, slots, weights, axes, implementation, dtype):
    return _sparse_forward(values, delta, slots, weights, axes, implementation, dtype)[0]


def _sparse_forward(values, delta, slots, weights, axes, implementation, dtype):
    """The read and what it touched; and slots and weights as exchanged, for the backward pass."""
    n_slots, along = len(values), _exchanged(slots.shape, values, weights, axes)

    def read(values, slots, weights):
        every = _gather(_read_slots(slots, weights, n_slots), axes.names)
        weights, group = _gather(weights, along), _of_group(every, axes)
        of_group = weights if along == axes.memory else _of_group(weights, axes)
        partial = _read_own(values, group, of_group, axes, implementation)
        ids, count = _touched(every, group, len(values), axes)
        touched = Touched(_in_table(ids, len(values), n_slots, axes), count)
        return (_to_owners(partial, axes), touched, group if along == axes.memory else every,
                weights)

    rows, kept = _rows(axes), _kept(along, axes)
    result, touched, slots, weights = on_shards(
        read, (axes.table, axes.tokens, axes.tokens),
        (axes.tokens, Touched(rows.ids, rows.count), kept, kept), axes)(values, slots, weights)
    return (result, touched), (values, slots, weights)


def _sparse_backward(axes, implementation, dtype, residuals, gradients):
    """Gradients of the rows read with a weight other than 0, summed over the replicas, which
    exchange their tokens or their rows, whichever is less; and of the weights."""
    values, slots, weights = residuals
    gradient, shards, n_slots = gradients[0], shards_in_use(axes), len(values)
    reads = len(gradient), slots.shape[1]
    along = _exchanged(reads, values, weights, axes)
    capacity = _capacity(n_slots, math.prod(reads), axes)

    def differentiate(values, slots, weights, gradient):
        slots, weights = _own(slots, weights, len(values), axes)
        of_group = len(slots) if along == axes.memory else len(slots) // _devices(axes.data)
        rows, by_read = bag.compact_gradients(
            values, slots, weights, _to_readers(gradient, along, axes),
            0 if along == axes.memory else _group_index(axes) * of_group, tokens=of_group,
            owners=shards.rows, implementation=implementation)
        if along == axes.memory and shards.data > 1:
            rows = sparse_rows.merge(jax.lax.all_gather(rows, axes.data), len(values), capacity)
        # Where a kernel had rounded the rows to this, XLA takes this and their widening out.
        return (rows._replace(ids=_in_table(rows.ids, len(values), n_slots, axes),
                              rows=rows.rows.astype(dtype)),
                _sum_to_owners(by_read, axes.memory))

    kept = _kept(along, axes)
    rows, by_weights = on_shards(
        differentiate, (axes.table, kept, kept, axes.tokens), (_rows(axes), axes.tokens), axes)(
            values, slots, weights, gradient)
    return None, rows.rows, None, by_weights


_sparse_bag.defvjp(_sparse_forward, _sparse_backward)


def no_delta(
    n_slots: int, width: int, reads: int, *, axes: Axes | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'rows {width}']:
    """Zeros [rows, width], a row for each that so many reads of `n_slots` can touch.

    The `delta` of a `sparse_embedding_bag` of T tokens with R reads each: `reads` is T · R. The
    rows of the gradient are summed in float32 and come in `dtype`.

    Raises:
      Refusal: the mesh in use lacks one of the axes.
    """
    axes = axes_of(axes)[0]
    rows = shards_in_use(axes).rows * _capacity(n_slots, reads, axes)
    return jnp.zeros((rows, width), dtype)


def rows_dtype(
    values: Array | jax.ShapeDtypeStruct, weights: Array | jax.ShapeDtypeStruct, *,
    axes: Axes | None = None, implementation: Implementation | None = None,
) -> jnp.dtype:
    """The narrowest dtype of `no_delta` in which a gradient of such a `sparse_embedding_bag` loses
    nothing: that of the values where the mesh in use is one of NVIDIA GPUs and their kernel makes
    each row, which it rounds to that; else float32.
    """
    axes, implementation = resolve(axes, implementation)
    shards, device = shards_in_use(axes), jax.sharding.get_abstract_mesh().abstract_device
    exact = jnp.dtype(jnp.float32)
    if values.dtype == exact or device is None or not (
            device.platform == 'gpu' and device.device_kind.startswith('NVIDIA')):
        return exact
    if shards.data > 1 and _exchanged(weights.shape, values, weights, axes) == axes.memory:
        return exact        # sums of several replicas' rows
    (n_slots, width), like = values.shape, jax.ShapeDtypeStruct
    part = like((n_slots // shards.rows, width // shards.columns), values.dtype)
    return values.dtype if bag.rounds_on_gpus(
        part, like(weights.shape, jnp.int32), owners=shards.rows,
        implementation=implementation) else exact


def merge(parts: SparseRows, n_slots: int, *, axes: Axes = OWN) -> SparseRows:
    """`sparse_rows.merge` of stacked parts, each row where it lives."""
    capacity = _capacity(n_slots, parts.ids.size // shards_in_use(axes).rows, axes)
    rows = _rows(axes)
    stacked = jax.tree.map(lambda spec: P(None, *spec), rows)

    def add(parts):
        size = n_slots // shards_in_use(axes).rows      # with as many places row i has place i
        parts = parts._replace(ids=_in_shard(parts.ids, size, axes))
        merged = sparse_rows.merge(parts, size, capacity)
        return merged._replace(ids=_in_table(merged.ids, size, n_slots, axes))

    return on_shards(add, (stacked,), rows, axes)(parts)


def take_rows(table: Array, ids: Int32[Array, 'rows'], *, axes: Axes = OWN) -> Array:
    """Rows of `table` ([S, V] or [S], split as values are) with these ids; zeros for ids of S."""
    def take(table, ids):
        return sparse_rows.take_rows(table, _in_shard(ids, len(table), axes))

    spec = P(*axes.table[:table.ndim])
    return on_shards(take, (spec, _rows(axes).ids), spec, axes)(table, ids)


def put_rows(
    table: Array, ids: Int32[Array, 'rows'], rows: Array, *, axes: Axes = OWN,
) -> Array:
    """`table` ([S, V] or [S], split as values are) with these rows set, in place where possible."""
    def put(table, ids, rows):
        return sparse_rows.put_rows(table, _in_shard(ids, len(table), axes), rows)

    spec = P(*axes.table[:table.ndim])
    return on_shards(put, (spec, _rows(axes).ids, spec), spec, axes)(table, ids, rows)


def on_parts(
    function: Callable, ids: Int32[Array, 'rows'], whole: Sequence[Array], rows: Sequence[Array],
    changing: Sequence[Array], *, axes: Axes = OWN,
) -> tuple[Array, ...]:
    """`function(ids, start, *whole, *rows, *changing)` of each part of a table, the first that is
    `changing`. It returns a number [1, 1] of the part and `changing` changed.

    `ids` are those of SparseRows, within the part; `start` is the slot and the column with which it
    begins; `rows` belong to the ids, and like `changing` ([S, V] or [S]) are split as the table.
    """
    def run(ids, whole, rows, changing):
        shards, size = shards_in_use(axes), changing[0].shape
        start = jnp.stack([jnp.int32(length) * (jax.lax.axis_index(names) if split > 1 else 0)
                           for length, names, split in zip(
                               size, (axes.rows, axes.columns), shards[1:])])
        return tuple(function(_in_shard(ids, size[0], axes), start, *whole, *rows, *changing))

    def specs(arrays):
        return tuple(P(*axes.table[:array.ndim]) for array in arrays)

    given: Any = _rows(axes).ids, tuple(P() for _ in whole), specs(rows), specs(changing)
    return on_shards(run, given, (axes.table, *specs(changing)), axes)(
        ids, tuple(whole), tuple(rows), tuple(changing))


def _rows(axes) -> Any:
    """How SparseRows are split: one with specs in the places of arrays."""
    by_rows: Any = P(axes.table[0])
    return SparseRows(ids=by_rows, rows=axes.table, count=by_rows)


def _capacity(n_slots, reads, axes):
    """Rows that `reads` reads can touch in one row shard."""
    return min(n_slots // shards_in_use(axes).rows, reads)


def _read_slots(slots, weights, n_slots):
    """Slots, or S for reads of weight 0, padding above all, and of no slot: they touch nothing."""
    return jnp.where((weights != 0) & (slots >= 0) & (slots < n_slots), slots, n_slots)


def _exchanged(reads, values, weights, axes):
    """The axes along which a sparse backward pass exchanges slots, weights and output gradients."""
    tokens, of_each = reads
    what = replica_exchange(shards_in_use(axes), tokens, of_each, len(values), values.shape[1],
                            values.dtype.itemsize, weights.dtype.itemsize).what
    return axes.memory if what == 'rows' else axes.names


def _kept(along, axes):
    """How arrays of the tokens exchanged along some axes are split."""
    return P(axes.data or None) if along == axes.memory else P()


# What follows runs within a shard, of `size` rows.

def _in_shard(slots, size, axes):
    """Slots of the table, or S, as rows of this shard, `size` where they are in another."""
    if shards_in_use(axes).rows == 1:
        return slots
    slots = slots - _first_row(size, axes)
    return jnp.where((slots >= 0) & (slots < size), slots, size)


def _in_table(ids, size, n_slots, axes):
    """Rows of this shard as slots of the table; `size`, which is none, as S."""
    if shards_in_use(axes).rows == 1:
        return ids
    return jnp.where(ids < size, ids + _first_row(size, axes), n_slots)


def _first_row(size, axes):
    """The slot with which this shard begins."""
    return jax.lax.axis_index(axes.rows) * size


def _touched(every, group, size, axes):
    """`bag.touched` of the slots of all; where every row has a place, each replica marks the rows
    that its group reads, and they share the marks."""
    if every.size < size or _devices(axes.data) == 1:
        return bag.touched(_in_shard(every, size, axes), size, owners=shards_in_use(axes).rows)
    marks = bag.marked(_in_shard(group, size, axes), size, owners=shards_in_use(axes).rows)
    return in_place(jax.lax.pmax(marks.astype(jnp.int8), axes.data) > 0)


def _own(slots, weights, size, axes):
    """Slots as rows of this shard, and weights: `size` and 0 for the reads of others; 0 for those
    of no slot."""
    slots = _in_shard(slots, size, axes)
    return slots, jnp.where((slots >= 0) & (slots < size), weights, 0)


def _read_own(values, slots, weights, axes, implementation):
    """Sums of the reads of this shard's rows; those of no slot add nothing."""
    rows, (own, weights) = shards_in_use(axes).rows, _own(slots, weights, len(values), axes)
    if rows == 1:       # then they are of some row, with weight 0
        own = jnp.clip(own, 0, len(values) - 1)
    return bag.embedding_bag(values, own, weights, owners=rows, implementation=implementation)


def _of_group(array, axes):
    """The tokens of this device's memory group, of those of all."""
    if _devices(axes.data) == 1:
        return array
    return array.reshape(_devices(axes.data), -1, *array.shape[1:])[_group_index(axes)]


def _group_index(axes):
    return jax.lax.axis_index(axes.data) if _devices(axes.data) > 1 else 0


def _gather(array, names):
    """The tokens of all devices along some axes of the mesh, in their order."""
    if _devices(names) == 1:
        return array
    return jax.lax.all_gather(array, names, tiled=True)


def _to_owners(reads, axes):
    """Partial reads of a group's tokens [T, V / columns], summed, to the tokens' owners."""
    if shards_in_use(axes).rows > 1:
        total = _sum_to_owners(reads.astype(jnp.float32), axes.rows)
        reads = total.astype(reads.dtype)
    if shards_in_use(axes).columns > 1:
        reads = jax.lax.all_to_all(reads, axes.columns, split_axis=0, concat_axis=1, tiled=True)
    return reads


def _to_readers(gradient, names, axes):
    """Gradients of own reads [T, V], to the devices along some axes that read parts of them."""
    if shards_in_use(axes).columns > 1:
        gradient = jax.lax.all_to_all(gradient, axes.columns, split_axis=1, concat_axis=0,
                                      tiled=True)
    return _gather(gradient, tuple(name for name in names if name not in axes.columns))


def _sum_to_owners(array, names):
    """Summed over the devices along some axes, each keeping what belongs to its tokens."""
    if _devices(names) == 1:
        return array
    return jax.lax.psum_scatter(array, names, scatter_dimension=0, tiled=True)


def _devices(names):
    return math.prod(shards_in_use(Axes(names, (), ())))
