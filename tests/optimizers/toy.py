"""Parameters with something of every group, and a loss of them that has its least value at zero."""

import jax
import jax.numpy as jnp
import numpy as np

TABLE = 'layers/0/memory/values'
# Of `make_optimizer`: which parameters are tables, and which of the backbone.
PARTS = {TABLE}, lambda path: not path.startswith('layers/0/memory')


def parameters(seed=0):
    """Large enough that Adafactor factors matrices and the table, the matrix square."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {'embeddings': {'word': {'embedding': draw(256, 128)}},
            'layers': {0: {'memory': {'values': draw(512, 160), 'codebooks': draw(2, 2, 8, 4)},
                           'query': {'kernel': draw(128, 128), 'bias': draw(128)}}}}


def loss(params):
    return sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(params)) / 2
