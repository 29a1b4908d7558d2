"""Retrieval, read, value rows and whatever else goes token by token, over the mesh in use
(`jax.set_mesh`), as on one device.

Tokens are split over all devices. A value table [S, V] is split by 'rows' and 'columns', which
together are the memory axis, and replicated over 'data'. Devices that differ in 'rows' and
'columns' alone form a memory group: they exchange the slots and weights of their tokens, each reads
what it holds for all of them, and the partial reads go back to the tokens' owners. Codebooks are
replicated. Never gathered: a table, its gradient, its optimiser state.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from pkm_jax.memory import product_keys, sparse_rows, value_bag as bag
from pkm_jax.memory.sparse_rows import SparseRows

MEMORY = ('rows', 'columns')
AXES = ('data', *MEMORY)
TOKENS = P(AXES)                # arrays with a leading axis of tokens or sequences
TABLE = P(*MEMORY)              # [S, V], and compact rows of it; without the second axis: [S]
ROWS = SparseRows(ids=P('rows'), rows=TABLE, count=P('rows'))


class Shards(NamedTuple):
    """How many parts tokens and tables are split into; all devices are data · rows · columns."""
    data: int = 1
    rows: int = 1
    columns: int = 1


def make_mesh(shards: Shards, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes 'data', 'rows' and 'columns'; a memory group's devices are adjacent.

    Of all devices, or of those given, which need not be there (planning/). Unlike `jax.make_mesh`
    it also splits the axes of a TPU's torus, where a layout is not a product of whole ones.
    """
    placed = mesh_utils.create_device_mesh(shards, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shards_in_use() -> Shards:
    """Of the mesh in use; 1 × 1 × 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return Shards() if mesh.empty else Shards(*(mesh.shape[axis] for axis in AXES))


def over_tokens(function: Callable, split: int) -> Callable:
    """`function` of each device's tokens: the first `split` arguments and all results are split,
    other arguments are whole on every device."""
    def run(*arrays):
        specs = tuple(TOKENS if n < split else P() for n in range(len(arrays)))
        return _on_shards(function, specs, TOKENS)(*arrays)

    return run


def device_index() -> Int32[Array, ''] | int:
    """Within a shard, the number of this device in the order of its tokens."""
    return 0 if shards_in_use() == Shards() else jax.lax.axis_index(AXES)


def top_k_product_keys(query, codebooks, k):
    """`product_keys.top_k_product_keys`, each device searching for its own tokens."""
    search = functools.partial(product_keys.top_k_product_keys, k=k)
    return over_tokens(search, split=1)(query, codebooks)


def value_bag(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    dtype: DTypeLike | None = None,
) -> Float[Array, 'T V']:
    """`value_bag.value_bag` of the values rounded to `dtype`; their gradient is dense, and split as
    they are. Each device's is rounded to `dtype`; the sum over replicas is in the values' own."""
    def read(values, slots, weights):
        values = values.astype(dtype or values.dtype)
        slots, mine = _in_shard(_gather(slots, MEMORY), len(values))
        weights = jnp.where(mine, _gather(weights, MEMORY), 0)
        return _to_owners(bag.value_bag(values, jnp.where(mine, slots, 0), weights))

    return _on_shards(read, (TABLE, TOKENS, TOKENS), TOKENS)(values, slots, weights)


def lookup(table: Float[Array, 'rows V'], ids: Int32[Array, 'T']) -> Float[Array, 'T V']:
    """Rows of a table that every device has, such as an embedding, as a `value_bag` of one read."""
    def read(ids, table):
        return bag.value_bag(table, ids[:, None], jnp.ones((len(ids), 1)))

    return over_tokens(read, split=1)(ids, table)


@jax.custom_vjp
def sparse_value_bag(
    values: Float[Array, 'S V'], delta: Float[Array, 'rows V'], slots: Int32[Array, 'T R'],
    weights: Float[Array, 'T R'],
) -> Float[Array, 'T V']:
    """`value_bag`, but for its derivative: `values` are a constant, and `delta`, zeros of the shape
    of `no_rows`, gets the gradient of the rows `touched_rows(slots, weights, S)`.

    That is the read Σ w · (values[slot] + delta[rank of slot]), of which no delta is ever added.
    """
    return value_bag(values, slots, weights)


def _sparse_forward(values, delta, slots, weights):
    return value_bag(values, slots, weights), (values, slots, weights)


def _sparse_backward(residuals, gradient):
    rows, by_read = compact_gradients(*residuals, gradient)
    return None, rows.rows, None, by_read


sparse_value_bag.defvjp(_sparse_forward, _sparse_backward)


def no_rows(n_slots: int, width: int, reads: int) -> Float[Array, 'rows {width}']:
    """Zeros in place of every row that `reads` reads can touch."""
    return jnp.zeros((shards_in_use().rows * _capacity(n_slots, reads), width), jnp.float32)


def touched_rows(
    slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'], n_slots: int,
) -> tuple[Int32[Array, 'rows'], Int32[Array, 'shards']]:
    """The `ids` and `count` of SparseRows of all slots that are read with a weight other than 0."""
    capacity = _capacity(n_slots, slots.size)

    def find(slots, weights):
        size = n_slots // shards_in_use().rows
        slots, _ = _in_shard(_gather(_read_slots(slots, weights, n_slots), AXES), size)
        ids, count = sparse_rows.distinct(slots, size, capacity)
        return _in_table(ids, size, n_slots), count

    return _on_shards(find, (TOKENS, TOKENS), (ROWS.ids, ROWS.count))(slots, weights)


def compact_gradients(
    values: Float[Array, 'S V'], slots: Int32[Array, 'T R'], weights: Float[Array, 'T R'],
    gradient: Float[Array, 'T V'],
) -> tuple[SparseRows, Float[Array, 'T R']]:
    """`value_bag.compact_gradients` of the rows in `touched_rows`, summed over the replicas.

    Replicas of a table exchange their tokens or their rows, whichever is less (`exchange`).
    """
    shards, n_slots = shards_in_use(), len(values)
    capacity = _capacity(n_slots, slots.size)
    exchanged = exchange(shards, *slots.shape, *values.shape, gradient.dtype.itemsize,
                         weights.dtype.itemsize).what
    axes = AXES if exchanged == 'tokens' else MEMORY

    def differentiate(values, slots, weights, gradient):
        slots, mine = _in_shard(_gather(_read_slots(slots, weights, n_slots), axes), len(values))
        weights = jnp.where(mine, _gather(weights, axes), 0)
        rows, by_read = bag.compact_gradients(values, slots, weights, _to_readers(gradient, axes))
        if exchanged == 'rows':
            rows = sparse_rows.merge(jax.lax.all_gather(rows, 'data'), len(values), capacity)
        elif shards.data > 1:
            by_read = by_read.reshape(shards.data, -1, *by_read.shape[1:])
            by_read = by_read[jax.lax.axis_index('data')]
        return (rows._replace(ids=_in_table(rows.ids, len(values), n_slots)),
                _sum_to_owners(by_read, MEMORY))

    return _on_shards(differentiate, (TABLE, TOKENS, TOKENS, TOKENS), (ROWS, TOKENS))(
        values, slots, weights, gradient)


def merge(parts: SparseRows, n_slots: int) -> SparseRows:
    """`sparse_rows.merge` of stacked parts, each row where it lives."""
    capacity = _capacity(n_slots, parts.ids.size // shards_in_use().rows)
    stacked = jax.tree.map(lambda spec: P(None, *spec), ROWS, is_leaf=lambda x: isinstance(x, P))

    def add(parts):
        return sparse_rows.merge(parts, n_slots, capacity)

    return _on_shards(add, (stacked,), ROWS)(parts)


def take_rows(table: Array, ids: Int32[Array, 'rows']) -> Array:
    """Rows of `table` ([S, V] or [S], split as values are) with these ids; zeros for ids of S."""
    def take(table, ids):
        return sparse_rows.take_rows(table, _in_shard(ids, len(table))[0])

    spec = P(*TABLE[:table.ndim])
    return _on_shards(take, (spec, ROWS.ids), spec)(table, ids)


def put_rows(table: Array, ids: Int32[Array, 'rows'], rows: Array) -> Array:
    """`table` ([S, V] or [S], split as values are) with these rows set, in place where possible."""
    def put(table, ids, rows):
        return sparse_rows.put_rows(table, _in_shard(ids, len(table))[0], rows)

    spec = P(*TABLE[:table.ndim])
    return _on_shards(put, (spec, ROWS.ids, spec), spec)(table, ids, rows)


class Exchange(NamedTuple):
    """What the replicas of a table exchange in a sparse backward pass."""
    what: str           # 'nothing', 'tokens' (slots, weights, output gradients) or 'rows'
    bytes: dict[str, int]   # that one device receives in a step, by choice


def exchange(
    shards: Shards, tokens: int, reads: int, n_slots: int, width: int, itemsize: int,
    weight_itemsize: int,
) -> Exchange:
    """The exchange of fewer bytes, for `tokens` of `reads` each, whose gradients have `itemsize`
    bytes a number and whose weights `weight_itemsize`. All replicas get all slots either way.

    Tokens: every replica computes the rows of all of them, in the order that one device would.
    Rows: it computes those of its own tokens, which are then merged.
    """
    others, own_reads = shards.data - 1, tokens // shards.data * reads
    columns = width // shards.columns
    rows = min(n_slots // shards.rows, own_reads)
    received = {'tokens': others * (tokens // shards.data * columns * itemsize
                                    + own_reads * (4 + weight_itemsize)),
                'rows': others * (rows * (columns + 1) * 4 + own_reads * 4)}
    return Exchange(min(received, key=received.get) if others else 'nothing', received)


def _on_shards(function, in_specs, out_specs):
    """`function` of each device's parts; of the whole where one device has everything."""
    if shards_in_use() == Shards():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _capacity(n_slots, reads):
    """Rows that `reads` reads can touch in one row shard."""
    return min(n_slots // shards_in_use().rows, reads)


def _read_slots(slots, weights, n_slots):
    """Slots, or S for reads of weight 0 (padding, above all): they touch nothing."""
    return jnp.where(weights != 0, slots, n_slots)


# What follows runs within a shard, of `size` rows.

def _in_shard(slots, size):
    """Slots of the table as rows of this shard, `size` where they are in another; and which are."""
    rows = shards_in_use().rows
    slots = slots - (jax.lax.axis_index('rows') * size if rows > 1 else 0)
    mine = (slots >= 0) & (slots < size)
    return jnp.where(mine, slots, size), mine


def _in_table(ids, size, n_slots):
    """Rows of this shard as slots of the table; `size`, which is none, as S."""
    start = jax.lax.axis_index('rows') * size if shards_in_use().rows > 1 else 0
    return jnp.where(ids < size, ids + start, n_slots)


def _gather(array, axes):
    """The tokens of all devices along some axes of the mesh, in their order."""
    if all(getattr(shards_in_use(), axis) == 1 for axis in axes):
        return array
    return jax.lax.all_gather(array, axes, tiled=True)


def _to_owners(reads):
    """Partial reads of a group's tokens [T, V / columns], summed, to the tokens' owners."""
    if shards_in_use().rows > 1:
        total = _sum_to_owners(reads.astype(jnp.float32), 'rows')
        reads = total.astype(reads.dtype)
    if shards_in_use().columns > 1:
        reads = jax.lax.all_to_all(reads, 'columns', split_axis=0, concat_axis=1, tiled=True)
    return reads


def _to_readers(gradient, axes):
    """Gradients of own reads [T, V], to the devices along some axes that read parts of them."""
    if shards_in_use().columns > 1:
        gradient = jax.lax.all_to_all(gradient, 'columns', split_axis=1, concat_axis=0, tiled=True)
    return _gather(gradient, tuple(axis for axis in axes if axis != 'columns'))


def _sum_to_owners(array, axes):
    """Summed over the devices along some axes, each keeping what belongs to its tokens."""
    if shards_in_use() == Shards():
        return array
    return jax.lax.psum_scatter(array, axes, scatter_dimension=0, tiled=True)
