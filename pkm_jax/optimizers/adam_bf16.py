"""Adam whose moments are kept in bfloat16: half of its state, a third of a dense update's bytes."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pkm_jax.optimizers.rounding import hashed, rounded
from pkm_jax.optimizers.sparse import Rate
from pkm_jax.refusal import Refusal


def adam_bf16(
    rate: Rate, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adam` of matrices, whose moments are rounded stochastically when a step has used them.

    Rounded to the nearest, a second moment would stand still: bfloat16 has 8 bits, and it changes
    by a thousandth of itself. `update` needs `rounding=key`; the random bits depend on the key, the
    row and the column alone, so that they are the same on any layout of devices.

    Raises:
      Refusal: `update` gets no `rounding`.
    """
    adam = optax.scale_by_adam(beta1, beta2, epsilon)

    def init(params):
        mu, nu = (jax.tree.map(lambda table: jnp.zeros_like(table, dtype=jnp.bfloat16), params)
                  for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None, *, rounding=None, **_):
        if rounding is None:
            raise Refusal('adam_bf16: update(…, rounding=key) needs a key: moments are rounded '
                          'stochastically.')
        steps, new = adam.update(_widened(updates), state._replace(
            mu=_widened(state.mu), nu=_widened(state.nu)))
        now = rate(state.count) if callable(rate) else rate
        leaves, tree = jax.tree.flatten(new.mu)
        keys = jax.tree.unflatten(tree, [jax.random.fold_in(rounding, number)
                                         for number in range(len(leaves))])
        pairs = jax.tree.map(_rounded_pair, new.mu, new.nu, keys)
        mu = jax.tree.map(lambda _, pair: pair[0], new.mu, pairs)
        nu = jax.tree.map(lambda _, pair: pair[1], new.nu, pairs)
        return jax.tree.map(lambda step: -now * step, steps), new._replace(mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _widened(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _rounded_pair(
    first: Float[Array, 'S V'], second: Float[Array, 'S V'], key: Array,
) -> tuple[Array, Array]:
    """Both in bfloat16, by the two halves of one hash: to hash is what such an update computes."""
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, first.shape, axis) for axis in (0, 1))
    bits = hashed(jax.random.bits(key, (2,)), rows, columns)
    return (rounded(first, bits & jnp.uint32(0xFFFF)).astype(jnp.bfloat16),
            rounded(second, bits >> 16).astype(jnp.bfloat16))
