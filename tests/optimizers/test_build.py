"""Optimizers by name: against Optax's own, by hand, and what their states are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon

from pkm_jax.memory.sparse_rows import SparseRows
from pkm_jax.models.interface import path_of
from pkm_jax.optimizers.build import (
    BACKBONE,
    OptimizerConfig,
    make_optimizer,
    values_optimizers,
    values_state_bytes,
)
from pkm_jax.optimizers.groups import schedule
from pkm_jax.optimizers.sparse import apply_updates
from pkm_jax.refusal import Refusal
from tests.optimizers.toy import PARTS, loss, parameters

RATE, DECAY, STEPS = .01, .1, 9
BETAS = .8, .95, 1e-4


def config(**changes):
    settings = dict(learning_rate=RATE, values_learning_rate=.02, warmup=2, weight_decay=DECAY,
                    beta1=BETAS[0], beta2=BETAS[1], epsilon=BETAS[2], clip=0.)
    return OptimizerConfig(**{**settings, **changes})


def paths(tree):
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def named(tree):
    return dict(zip(paths(tree), jax.tree.leaves(tree)))


def after_steps(optimizer, params, steps=3):
    """The parameters, compiled as training is."""
    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def of_optax(name, rate):
    """What decayed and undecayed parameters get, written out."""
    adam = optax.adamw(rate, *BETAS, weight_decay=0.)
    if name == 'adam':
        return optax.adamw(rate, *BETAS, weight_decay=DECAY), adam
    if name == 'lamb':
        return optax.lamb(rate, *BETAS, weight_decay=DECAY), adam
    if name == 'adafactor':
        return (optax.adafactor(rate, weight_decay_rate=lambda n: DECAY * rate(n)),
                optax.adafactor(rate))
    numbers = {'embeddings/word/embedding': None, 'layers/0/memory/codebooks': None,
               'layers/0/query/kernel': MuonDimensionNumbers()}
    return muon(rate, eps=BETAS[2], weight_decay=DECAY, adam_b1=BETAS[0], adam_b2=BETAS[1],
                adam_weight_decay=DECAY, muon_weight_dimension_numbers=numbers,
                consistent_rms=.2), adam


@pytest.mark.parametrize('name', BACKBONE)
def test_backbone_is_updated_as_by_optax(name):
    """Each group alone, over three steps of the schedule; and the loss falls."""
    params = parameters()
    ours = after_steps(make_optimizer(config(optimizer=name), STEPS, *PARTS), params)
    assert loss(ours) < .99 * loss(params)
    undecayed = {path: leaf for path, leaf in named(params).items() if path.endswith('bias')}
    decayed = {path: leaf for path, leaf in named(params).items()
               if not path.endswith(('bias', 'values'))}
    optimizers = of_optax(name, schedule(RATE, 2, STEPS))
    for optimizer, group in zip(optimizers, (decayed, undecayed)):
        theirs = after_steps(optimizer, group)
        for path in group:
            np.testing.assert_allclose(named(ours)[path], theirs[path], rtol=1e-5, atol=1e-6,
                                       err_msg=path)


def test_no_backbone_optimizers_are_the_same():
    kernels = [after_steps(make_optimizer(config(optimizer=name), STEPS, *PARTS),
                           parameters())['layers'][0]['query']['kernel'] for name in BACKBONE]
    for number, kernel in enumerate(kernels):
        for other in kernels[:number]:
            assert np.max(np.abs(kernel - other)) > 1e-3


@pytest.mark.parametrize('name, epsilon', [('adam', 0.), ('adam', .5), ('sgd', 0.)])
def test_dense_values_are_updated_as_by_optax(name, epsilon):
    rate, params = schedule(.02, 2, STEPS), parameters()
    optimizer = {'adam': lambda: optax.adam(rate, *BETAS[:2], epsilon or BETAS[2]),
                 'sgd': lambda: optax.sgd(rate)}[name]()
    settings = config(values_optimizer=name, values_epsilon=epsilon)
    ours = after_steps(make_optimizer(settings, STEPS, *PARTS), params)
    table = params['layers'][0]['memory']['values']
    np.testing.assert_array_equal(ours['layers'][0]['memory']['values'],
                                  after_steps(optimizer, table))


@pytest.mark.parametrize('name', values_optimizers(sparse=True))
def test_sparse_values_are_changed_where_they_were_read(name):
    """The loss falls, and rows that were not read keep every bit."""
    params, read = parameters(), jnp.arange(3, 200, 7, dtype=jnp.int32)
    optimizer = make_optimizer(config(values_optimizer=name, warmup=0, clip=1.), STEPS, *PARTS,
                               sparse=True)
    gradient = jax.grad(loss)(params)
    memory = gradient['layers'][0]['memory']
    memory['values'] = SparseRows(read, memory['values'][read], jnp.asarray([len(read)]))
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    after = apply_updates(params, updates, jax.random.key(0))
    old, new = (tree['layers'][0]['memory']['values'] for tree in (params, after))
    assert loss(new) < loss(old)
    changed = np.flatnonzero(np.any(np.asarray(new != old), axis=1))
    np.testing.assert_array_equal(changed, read)


@pytest.mark.parametrize('name', sorted({*values_optimizers(True)} - {'sgd'}))
def test_sparse_values_have_their_own_epsilon(name):
    """An epsilon that is far above the gradient takes nearly all of the update."""
    params = parameters()
    gradient = jax.grad(loss)(params)
    memory = gradient['layers'][0]['memory']
    read = jnp.arange(len(memory['values']), dtype=jnp.int32)
    memory['values'] = SparseRows(read, memory['values'], jnp.asarray([len(read)]))

    def moved(**epsilons):
        optimizer = make_optimizer(config(values_optimizer=name, warmup=0, **epsilons), STEPS,
                                   *PARTS, sparse=True)
        updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
        return np.linalg.norm(updates['layers'][0]['memory']['values'].rows)

    of_all = functools.partial(moved, values_epsilon=0.)
    assert moved(epsilon=1e3, values_epsilon=1e-8) == of_all(epsilon=1e-8)
    assert of_all(epsilon=1e-8) > 1e6 * of_all(epsilon=1e9)


def test_first_update_by_hand():
    """Adam's first step moves by the learning rate, whatever the gradient's size."""
    settings = OptimizerConfig(warmup=0, learning_rate=0.1, values_learning_rate=0.5,
                               weight_decay=0.01, clip=0., epsilon=1e-12)
    params = {'layers': {0: {'memory': {'values': jnp.full(2, 3.)}}},
              'pooler': {'kernel': jnp.full(2, 3.), 'bias': jnp.full(2, 3.)}}
    gradient = jax.tree.map(lambda _: jnp.asarray([2., -1.]), params)
    optimizer = make_optimizer(settings, 10, *PARTS)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates['layers'][0]['memory']['values'], [-.5, .5], rtol=1e-5)
    np.testing.assert_allclose(updates['pooler']['bias'], [-.1, .1], rtol=1e-5)
    np.testing.assert_allclose(updates['pooler']['kernel'], [-.1 - .003, .1 - .003], rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_groups():
    # So large an epsilon makes updates proportional to gradients.
    optimizer = make_optimizer(config(warmup=0, clip=1., epsilon=1e9), STEPS, {'memory/values'},
                               lambda path: False)

    def updates(values, bias):
        params = {'memory': {'values': jnp.zeros(1)}, 'bias': jnp.zeros(1)}
        gradient = {'memory': {'values': jnp.asarray([values])}, 'bias': jnp.asarray([bias])}
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    unit, large = updates(.6, .8), updates(6., 8.)
    np.testing.assert_allclose(large['bias'], unit['bias'], rtol=1e-6)
    np.testing.assert_allclose(large['memory']['values'], unit['memory']['values'], rtol=1e-6)


@pytest.mark.parametrize('sparse, values', [
    (False, ['inner_state/0/count', 'inner_state/0/mu/memory/values',
             'inner_state/0/nu/memory/values', 'inner_state/1/count']),
    (True, ['inner_state/count', 'inner_state/moments/0/memory/values',
            'inner_state/moments/1/memory/values'])])
def test_checkpoints_name_the_state_as_they_did(sparse, values):
    """Another structure needs a way to read the checkpoints that have this one."""
    params = {'bias': jnp.zeros(2), 'kernel': jnp.zeros((2, 2)),
              'memory': {'values': jnp.zeros((4, 2))}}
    adamw = ['0/count', '0/mu/{}', '0/nu/{}', '2/count']
    expected = [
        *(f'decayed/inner_state/{name.format("kernel")}' for name in adamw),
        *(f'undecayed/inner_state/{name.format("bias")}' for name in adamw),
        *(f'values/{name}' for name in values)]
    for clip, prefix in ((1., '1/inner_states/'), (0., 'inner_states/')):
        state = make_optimizer(config(clip=clip), STEPS, {'memory/values'},
                               lambda path: False, sparse).init(params)
        assert paths(state) == [prefix + name for name in expected]


@pytest.mark.parametrize('sparse, expected', [
    (False, {'adam': 8, 'adam_bf16': 4, 'sgd': 0}),
    (True, {'adam': 8, 'sgd': 0, 'rowwise_adam': 4 + 4 / 64, 'rowwise_adagrad': 4 / 64})])
def test_bytes_of_state_per_number(sparse, expected):
    assert {name: values_state_bytes(config(values_optimizer=name), sparse, width=64)
            for name in values_optimizers(sparse)} == expected


def test_row_wise_optimizers_need_sparse_updates():
    settings = config(values_optimizer='rowwise_adam')
    for use in (lambda: make_optimizer(settings, STEPS, *PARTS),
                lambda: values_state_bytes(settings, sparse=False, width=64)):
        with pytest.raises(Refusal, match=r"'rowwise_adam' is none of \('adam', 'adam_bf16', 'sgd'\).*"
                                          r"memory.updates = 'sparse'"):
            use()


@pytest.mark.parametrize('field, value', [
    ('optimizer', 'lion'), ('values_optimizer', 'lamb'), ('beta2', 1.), ('epsilon', 0.),
    ('learning_rate', -1.), ('clip', float('nan'))])
def test_fields_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(Refusal, match=rf'train\.{field} = '):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize('freeze, still', [
    ('tables', {'layers/0/memory/values'}),
    ('backbone', {'embeddings/word/embedding', 'layers/0/query/kernel', 'layers/0/query/bias'})])
@pytest.mark.parametrize('sparse', [False, True])
def test_what_is_frozen_stays_and_counts_for_nothing_in_clipping(freeze, still, sparse):
    params = parameters()
    gradient = jax.tree.map(lambda leaf: 100 * leaf, params)
    if sparse:
        rows = SparseRows(jnp.arange(4, dtype=jnp.int32), jnp.ones((4, 160)), jnp.array([4]))
        gradient['layers'][0]['memory']['values'] = rows
    optimizer = make_optimizer(config(freeze=freeze, clip=1., warmup=0), STEPS, *PARTS, sparse)
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradient, state, params)
    changed = apply_updates(params, updates, jax.random.key(0))
    before, after = named(params), named(changed)
    assert {name for name in before if np.array_equal(before[name], after[name])} == still
    assert not [path for path in paths(state) if any(name in path for name in still)]   # no moments
    # The others move as if the frozen had no gradient.
    alone = {name: 0 if name in still else 1 for name in before}
    rest = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * alone[path_of(path)] if path_of(path) in alone else leaf,
        gradient)
    if freeze == 'backbone' and not sparse:
        whole = make_optimizer(config(clip=1., warmup=0), STEPS, *PARTS, sparse)
        expected, _ = whole.update(rest, whole.init(params), params)
        for name in set(before) - still:
            np.testing.assert_allclose(named(updates)[name], named(expected)[name], rtol=1e-6)
