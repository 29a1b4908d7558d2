"""The retrieval's kernels for TPUs, interpreted, against float64 scores of all slots."""

import functools

import jax
import numpy as np
import pytest

from pkm_jax.memory.kernels.tpu import retrieval
from pkm_jax.memory.product_keys import top_k_product_keys
from tests.memory.kernels.searches import check_best, check_gradients, check_ties, make

search = functools.partial(top_k_product_keys, implementation='tpu')
# Fused, CPUs' compiler works out a network anew for each reader of its wires: over 24 GB for K = 32.
unfused = jax.jit(search, static_argnums=2, compiler_options={'xla_disable_hlo_passes': 'fusion'})
# Two tiles of tokens, the second of which is filled up.
MANY = 1030


@pytest.mark.parametrize('tokens, heads, n_keys, k, dtype', [
    (MANY, 2, 20, 4, 'float32'),    # the last block of sub-keys is filled up
    (20, 1, 64, 5, 'bfloat16'),     # lists are padded to a power of two; two blocks
    (1, 1, 7, 1, 'float32'),
    (9, 1, 8, 8, 'float32'),        # every sub-key is kept
    pytest.param(300, 1, 600, 32, 'bfloat16', marks=pytest.mark.slow),
])
def test_finds_the_best_slots(tokens, heads, n_keys, k, dtype):
    query, codebooks = make(tokens, heads, n_keys, dtype)
    check_best(unfused, query, codebooks, k)


def test_ties_leave_the_scores_exact_and_the_slots_distinct():
    check_ties(search, n_keys=24, k=4, distinct=1 / 2)


@pytest.mark.parametrize('value', [-np.inf, np.inf, np.nan, -np.nan, 0.])
def test_slots_are_distinct_whatever_the_scores(value):
    """All sub-keys' scores the same, or all but two; blocks are filled up."""
    query, codebooks = make(16, 2, 20)
    query = query.at[:].set(1.)
    codebooks = codebooks.at[0].set(value / 16).at[1, :, 2:].set(value / 16)
    _, slots = search(query, codebooks, 4)
    assert (np.diff(np.sort(slots)) > 0).all() and slots.min() >= 0 and slots.max() < 20 ** 2


@pytest.mark.parametrize('dtype, limit', [('float32', 1e-6), ('bfloat16', 5e-3)])
@pytest.mark.parametrize('k', [1, 4])
def test_gradients_agree_with_float64(dtype, limit, k):
    """Two tiles of tokens; sub-keys and query are filled up; sub-keys of several slots."""
    check_gradients(search, 140, 20, k, dtype, limit)


@pytest.mark.parametrize('change, word', [
    ({'k': 33}, 'top_k = 33'), ({'n_keys': 4097}, '4097 sub-keys'), ({'dtype': 'float16'}, 'float16'),
    ({'half': 24, 'tokens': 3, 'n_keys': 40}, None)])
def test_says_what_it_does_not_support(change, word):
    sizes = {'tokens': 16, 'n_keys': 64, 'half': 16, 'k': 8, 'dtype': 'float32'} | change
    k = sizes.pop('k')
    reason = retrieval.unsupported(*jax.eval_shape(lambda: make(heads=1, **sizes)), k=k)
    assert (reason is None) if word is None else word in reason
