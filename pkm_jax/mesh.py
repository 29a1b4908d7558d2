"""Meshes of devices, and which of their axes split tokens and tables.

Tokens are split over all axes that are named here. A value table [S, V] is split by rows and
columns, and replicated over the data axes; devices that differ in rows and columns alone form a
memory group.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from pkm_jax.console import warn_once
from pkm_jax.refusal import Refusal


class Axes(NamedTuple):
    """Names of the mesh's axes that split tokens and value tables.

    Tokens are split over all of them, a table over `rows` and `columns`; () splits nothing.
    """
    data: tuple[str, ...] = ('data',)           #: these split the tokens alone
    rows: tuple[str, ...] = ('rows',)           #: these split the rows of a table
    columns: tuple[str, ...] = ('columns',)     #: these split the columns of a table

    @property
    def memory(self) -> tuple[str, ...]:
        """The axes that split a table: rows, then columns."""
        return *self.rows, *self.columns

    @property
    def names(self) -> tuple[str, ...]:
        """All axes, in the order in which they split the tokens."""
        return *self.data, *self.memory

    @property
    def tokens(self) -> P:
        """The PartitionSpec of arrays whose first axis is one of tokens or sequences."""
        return P(_entry(self.names))

    @property
    def table(self) -> P:
        """The PartitionSpec of a table [S, V]; its first entry is that of arrays [S]."""
        return P(_entry(self.rows), _entry(self.columns))


def _entry(names):
    return names[0] if len(names) == 1 else names or None


OWN = Axes()
NONE = Axes((), (), ())


class Shards(NamedTuple):
    """Into how many parts tokens and tables are split, on data · rows · columns devices."""
    data: int = 1       #: copies of each table
    rows: int = 1       #: parts of a table by rows
    columns: int = 1    #: parts of a table by columns


def make_mesh(shards: Shards, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes 'data', 'rows' and 'columns'; a memory group's devices are adjacent.

    `devices`: all devices of this machine or cluster unless they are given. The devices that share
    one copy of a table are a memory group. Where there are several TPU slices, each of them holds
    whole memory groups, so that only the data axis crosses the network between slices. Unlike
    `jax.make_mesh` it can also split one axis of a TPU's torus over two axes of the mesh.

    Raises:
      Refusal: a memory group does not fit into a slice.
      ValueError: there are more devices or fewer than parts.
    """
    devices = jax.devices() if devices is None else devices
    slices = len(set(map(slice_of, devices)))
    if slices > 1:
        if shards.data % slices:
            raise Refusal(f'{slices} slices hold {shards.data} copies of each table, in '
                          f'{shards.rows} × {shards.columns} parts: set memory.shards.rows and '
                          f'columns so that their product divides the {len(devices) // slices} '
                          f'devices of a slice.')
        placed = mesh_utils.create_hybrid_device_mesh(
            shards._replace(data=shards.data // slices), (slices, 1, 1), devices,
            allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shards, devices, allow_split_physical_axes=True)
    return Mesh(placed, OWN.names, axis_types=(AxisType.Auto,) * 3)


def slice_of(device: jax.Device) -> int:
    """The number of the TPU slice that a device is in; 0 of devices that are in none."""
    return getattr(device, 'slice_index', 0) if device.platform == 'tpu' else 0


def mesh_in_use() -> AbstractMesh | None:
    """The mesh in use (`jax.set_mesh`); None without one, and within a `jax.shard_map` over it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def shards_in_use(axes: Axes = OWN) -> Shards:
    """Of the mesh in use; 1 × 1 × 1 without one.

    Raises:
      Refusal: the mesh lacks one of the axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Shards()
    lacking = [name for name in axes.names if name not in mesh.shape]
    if lacking:
        raise Refusal(f'The mesh in use has the axes {mesh.axis_names}, but not {lacking}, which '
                      f'axes = {axes} names: name axes of the mesh, or leave axes None.')
    return Shards(*(math.prod(mesh.shape[name] for name in names) for names in axes))


def axes_of(axes: Axes | None) -> tuple[Axes, bool]:
    """The axes that a layer splits its arrays over, and whether XLA is to split them instead.

    `axes` that are given are used; NONE leaves several devices to XLA. With None it depends on the
    mesh in use (`jax.set_mesh`):

    * without a mesh, or in one of a single device, nothing is split;
    * in a mesh with the axes 'data', 'rows' and 'columns' (`make_mesh`), these split;
    * in any other mesh, every device has the whole table, and XLA's partitioner splits the tokens.
      It cannot split kernels, so that they are not used. That is logged once for each mesh.

    Raises:
      Refusal: the mesh lacks one of the axes.
    """
    mesh = mesh_in_use()
    if mesh is None or mesh.size == 1 and axes in (None, NONE):
        return NONE, False
    if axes is not None:
        shards_in_use(axes)
        return axes, not axes.names
    if set(OWN.names) <= set(mesh.axis_names):
        return OWN, False
    warn_once(__name__, "A memory under a mesh with the axes %s: its table is on every device, its "
              "work is left to XLA's partitioner, without kernels. To split both: axes=Axes(data, "
              "rows, columns).", mesh.axis_names)
    return NONE, True


def explicit_axes(axes: Axes) -> Axes:
    """Those of them that are Explicit in the mesh in use: that types of arrays can name."""
    mesh = mesh_in_use()
    kinds = {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_types))
    return Axes(*(tuple(name for name in names if kinds.get(name) == AxisType.Explicit)
                  for names in axes))


def on_auto_axes(function: Callable, out_specs: Any) -> Callable:
    """`function` in a mesh with Explicit axes, which within it are Auto; elsewhere as it is."""
    mesh = mesh_in_use()
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=out_specs)


def specs_of(arrays: Any) -> Any:
    """How a tree of arrays is split over Explicit axes, by their types."""
    return jax.tree.map(lambda array: jax.typeof(array).sharding.spec, arrays)


def bytes_on_device(arrays: Any) -> int:
    """What arrays, abstract ones too, take on each device that they are laid out over."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(arrays))


def on_shards(function: Callable, in_specs, out_specs, axes: Axes = OWN) -> Callable:
    """`function` of each device's parts; of the whole where one device has everything."""
    shards_in_use(axes)
    mesh = mesh_in_use()
    if mesh is None or mesh.size == 1 or not axes.names:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def over_tokens(function: Callable, split: int, axes: Axes = OWN) -> Callable:
    """`function` of each device's tokens: the first `split` arguments and all results are split,
    other arguments are whole on every device."""
    def run(*arrays):
        specs = tuple(axes.tokens if n < split else P() for n in range(len(arrays)))
        return on_shards(function, specs, axes.tokens, axes)(*arrays)

    return run


def device_index(axes: Axes = OWN) -> Int32[Array, ''] | int:
    """Within a shard, the number of this device in the order of its tokens."""
    return 0 if shards_in_use(axes) == Shards() else jax.lax.axis_index(axes.names)
