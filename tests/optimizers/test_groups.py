"""Parameter groups, their norms, and the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.optimizers.groups import group_norms, group_of, schedule

TABLES = frozenset({'layers/0/memory/values', 'layers/1/memory/values'})


@pytest.mark.parametrize('path, group', [
    ('layers/3/memory/values', 'values'),
    ('layers/3/memory/codebooks', 'decayed'),
    ('layers/3/memory/query/kernel', 'decayed'),
    ('layers/3/memory/query/bias', 'undecayed'),
    ('layers/3/memory/query_norm/scale', 'undecayed'),
    ('layers/3/memory_scale', 'undecayed'),
    ('layers/3/attention/value/kernel', 'decayed'),
    ('layers/3/output_norm/bias', 'undecayed'),
    ('embeddings/word/embedding', 'decayed'),
    ('mlm/bias', 'undecayed'),
])
def test_groups(path, group):
    assert group_of(path, {'layers/3/memory/values'}) == group


def test_a_table_is_one_by_its_path_alone():
    assert group_of('bank', {'bank'}) == 'values'
    assert group_of('memory/bank', {'bank'}) == group_of('memory/values', {'bank'}) == 'decayed'


def test_schedule():
    rate = schedule(2., warmup=4, steps=12)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 8, 12)], [0, 1, 2, 1, 0])
    np.testing.assert_allclose(schedule(2., warmup=0, steps=10)(5), 1.)


def test_norms_by_group():
    """Rows count, their ids and number do not; bfloat16 is summed in float32."""
    rows = SparseRows(jnp.asarray([5, 7, 9]), jnp.asarray([[3., 0.], [0., 4.], [0., 0.]]),
                      jnp.asarray([2]))
    tree = {'layers': {0: {'memory': {'values': rows}},
                       1: {'memory': {'values': jnp.full((3, 4), 1.)}}},
            'query': {'kernel': jnp.full((63, 65), 1 + 2 ** -7, jnp.bfloat16),
                      'bias': jnp.asarray([6., 8.])},
            'word': {'embedding': jnp.asarray([[2.]])}}
    norms = jax.jit(group_norms, static_argnums=1)(tree, TABLES)
    assert {norm.dtype for norm in norms.values()} == {jnp.dtype('float32')}
    np.testing.assert_allclose([norms[group] for group in ('values', 'undecayed', 'decayed')],
                               [37 ** .5, 10., (63 * 65 * (1 + 2 ** -7) ** 2 + 4) ** .5], rtol=1e-6)


def test_groups_that_are_not_there_have_no_norm():
    assert list(group_norms({'query': {'kernel': jnp.ones(2)}}, TABLES)) == ['decayed']
