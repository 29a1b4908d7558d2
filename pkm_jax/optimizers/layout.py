"""How the state of an optimizer is split over a mesh: each array as the parameter it belongs to."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def state_specs(
    optimizer: optax.GradientTransformation, params: Any, param_specs: Any,
) -> Any:
    """A tree like `optimizer.init(params)`, of how each of its arrays is split.

    Moments of a parameter's shape are split as it is; those that lack one of its axes, such as
    Adafactor's, as its other axes are; counts and placeholders are whole on every device.

    JAX itself works this out. `init` is traced for parameters whose shardings are part of their
    types (https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html), so that sums and
    `zeros_like` hand the axes on and nothing is guessed from shapes. The mesh of that trace has one
    device, so that sizes need not divide; the one in use does not matter.

    Args:
      params: arrays or abstract arrays; SparseRows are for updates, not for `init`.
      param_specs: a tree like the parameters, of how each is split.
    """
    axes = sorted({axis for spec in jax.tree.leaves(param_specs) for entry in spec
                   for axis in _axes_of(entry)})
    mesh = AbstractMesh((1,) * len(axes), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))

    def typed(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    # A mesh in use can be left for none, but not for one of another size.
    no_mesh = AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(no_mesh), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(optimizer.init, jax.tree.map(typed, params, param_specs))
    return jax.tree.map(lambda leaf: _trimmed(leaf.sharding.spec) if leaf.sharding else P(), state)


def _axes_of(entry):
    return (entry,) if isinstance(entry, str) else entry or ()


def _trimmed(spec):
    """The same without the Nones at its end."""
    split = [axis for axis, entry in enumerate(spec) if entry is not None]
    return P(*spec[:split[-1] + 1]) if split else P()
