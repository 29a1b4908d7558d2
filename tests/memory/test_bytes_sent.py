"""What is said to be sent, against the collectives of compiled programs."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from pkm_jax.memory import sharded
from pkm_jax.memory.bytes_sent import Read, bytes_sent
from pkm_jax.mesh import OWN, Shards, make_mesh
from pkm_jax.planning import hlo

WIDTH = 16


def dense(values, slots, weights, direction):
    read, pull = jax.vjp(lambda v, w: sharded.embedding_bag(v, slots, w), values, weights)
    return read, *pull(direction)


def sparse(values, slots, weights, direction):
    delta = sharded.no_delta(*values.shape, slots.size)
    read, pull, touched = jax.vjp(lambda d, w: sharded.sparse_embedding_bag(values, d, slots, w),
                                  delta, weights, has_aux=True)
    return read, touched, *pull(direction)


def compiled_bytes(step, shards, read):
    """Bytes sent by axes, of the compiled program."""
    shapes = ((read.slots, read.width), (read.tokens, read.reads), (read.tokens, read.reads),
              (read.tokens, read.width))
    mesh, tokens = make_mesh(shards), OWN.tokens
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
                 for shape, dtype, spec in zip(
                     shapes, (jnp.float32, jnp.int32, jnp.float32, jnp.float32),
                     (OWN.table, tokens, tokens, tokens))]
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(*arguments).compile().as_text()
    sums = collections.Counter()
    for one in hlo.Module(text).collectives(mesh.size):
        sums[one.axes(dict(mesh.shape))] += one.bytes_sent
    return sums


# Replicas exchange tokens where a table has many slots, else rows.
@pytest.mark.parametrize('step, shards, slots', [
    (dense, Shards(2, 2, 2), 64), (sparse, Shards(2, 2, 2), 4096), (sparse, Shards(2, 2, 2), 8)])
def test_compiled_programs_send_what_is_said(step, shards, slots):
    read = Read(tokens=64, reads=6, slots=slots, width=WIDTH, itemsize=4, weight_itemsize=4)
    said = collections.Counter()
    for one in bytes_sent(shards, read, step is sparse):
        said[' × '.join(one.axes)] += one.bytes
    found = compiled_bytes(step, shards, read)
    print(said, found)
    assert found == pytest.approx(said)
