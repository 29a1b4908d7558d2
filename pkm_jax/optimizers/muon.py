"""Optax's Muon, with the matrices of one shape orthogonalised together, by each device a share."""

import jax
import jax.numpy as jnp
import optax
from jax.lax import with_sharding_constraint
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax import contrib

from pkm_jax.mesh import mesh_in_use


def scale_by_muon(epsilon: float) -> optax.GradientTransformation:
    """Optax's `scale_by_muon` of matrices, with the same state.

    There devices that hold the same matrices orthogonalise each of them, one by one. `epsilon` is
    added to norms.
    """
    # Without iterations, and without the norm that others divide by first: the momentum as it is.
    momentum = contrib.scale_by_muon(
        ns_steps=0, preconditioning='aol', weight_dimension_numbers=lambda matrices: jax.tree.map(
            lambda _: contrib.MuonDimensionNumbers(), matrices))

    def update(updates, state, params=None):
        updates, state = momentum.update(updates, state, params)
        matrices, tree = jax.tree.flatten(updates)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, matrix in enumerate(matrices):
            by_shape.setdefault(matrix.shape, []).append(number)
        for numbers in by_shape.values():
            stack = _orthogonal(jnp.stack([matrices[number] for number in numbers]), epsilon)
            for number, matrix in zip(numbers, stack):
                matrices[number] = matrix
        return jax.tree.unflatten(tree, matrices), state

    return optax.GradientTransformation(momentum.init, update)


def _orthogonal(stack: Float[Array, 'n rows columns'], epsilon) -> Float[Array, 'n rows columns']:
    """Each matrix of a stack orthogonalised, where there is one for each device by its own device.

    Of fewer all devices have all: XLA would gather as many as there are devices.
    """
    orthogonal = contrib.scale_by_muon(     # of what has no past
        beta=0., nesterov=False, eps=epsilon,
        weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 2))
    mesh = mesh_in_use()
    is_shared = mesh is not None and 1 < mesh.size <= len(stack)
    if is_shared:
        stack = with_sharding_constraint(stack, P(mesh.axis_names))
    stack, _ = orthogonal.update(stack, orthogonal.init(stack))
    return with_sharding_constraint(stack, P()) if is_shared else stack
