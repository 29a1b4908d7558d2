"""Training steps and checkpoints over meshes of eight devices against one device."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.mesh import OWN, Shards
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import table_paths
from pkm_jax.optimizers import muon
from pkm_jax.optimizers.build import OptimizerConfig, make_optimizer
from pkm_jax.tasks.masked_lm import MaskedLM
from pkm_jax.training.state import batch_sharding, initial_state, laid_out, model_graph
from pkm_jax.training.step import train_step

LENGTH, PREDICTIONS, ROWS = 8, 3, 16
TASK = MaskedLM(length=LENGTH, max_predictions=PREDICTIONS)
pytestmark = pytest.mark.usefixtures('compile_once')
MODEL = BertConfig(
    vocab_size=40, layers=1, width=16, attention_heads=2, feed_forward_width=16, max_length=8,
    dropout=0.1, attention_dropout=0.1, memory_layers=(0,), placement='add',
    memory=MemoryConfig(sub_keys=8, heads=2, top_k=2, query_width=6, query_norm='batch',
                        input_dropout=0.1, query_dropout=0.1, value_dropout=0.1))
SHARED = dataclasses.replace(MODEL, layers=2, memory_layers=(0, 1), shared_values=True, remat=True)
ONE = Shards()
LAYOUTS = [Shards(1, 8, 1), Shards(1, 1, 8), Shards(1, 2, 4), Shards(2, 4, 1), Shards(2, 1, 4),
           Shards(2, 2, 2), Shards(4, 2, 1), Shards(4, 1, 2), Shards(8, 1, 1)]
# In the time that fast tests have; sparse, of one optimizer below 2 × 2 × 2 is fast.
FAST = False, Shards(2, 2, 2)
CASES = [pytest.param(sparse, shards, id=f'{sparse}-{"×".join(map(str, shards))}',
                      marks=() if (sparse, shards) == FAST else pytest.mark.slow)
         for sparse in (False, True) for shards in LAYOUTS]


def batch(seed):
    """Rows of different lengths, with different numbers of predictions."""
    rng = np.random.default_rng(seed)
    asked = np.arange(PREDICTIONS)[None] < rng.integers(0, PREDICTIONS + 1, (ROWS, 1))
    return {'tokens': rng.integers(5, 40, (ROWS, LENGTH), np.int32),
            'segments': np.zeros((ROWS, LENGTH), np.int32),
            'lengths': rng.integers(4, LENGTH + 1, ROWS, np.int32),
            'mlm_positions': rng.integers(0, 4, (ROWS, PREDICTIONS), np.int32),
            'mlm_labels': rng.integers(5, 40, (ROWS, PREDICTIONS), np.int32),
            'mlm_weights': asked.astype(np.float32)}


class Training:
    """States of one model over one mesh, and steps between them."""

    def __init__(self, shards, sparse, accumulation_steps=1, fsdp=False, model=MODEL, **optimizer):
        devices = jax.devices()[:np.prod(shards)]
        self.mesh = jax.make_mesh(shards, OWN.names, devices=devices,
                                  axis_types=(jax.sharding.AxisType.Auto,) * 3)
        tables = table_paths(model.memories)
        optimizer = make_optimizer(OptimizerConfig(warmup=1, clip=.5, **optimizer), 6, tables,
                                   model.is_backbone, sparse)
        self.initialise = functools.partial(initial_state, config=model, optimizer=optimizer,
                                            track_dead=True)
        with jax.set_mesh(self.mesh):
            self.abstract = laid_out(jax.eval_shape(self.initialise, 0), optimizer, self.mesh,
                                     tables, fsdp)
        self.layout = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.step = functools.partial(
            train_step, task=TASK, graph=model_graph(model), model=model,
            optimizer=optimizer, seed=np.uint32(0), accumulation_steps=accumulation_steps,
            sparse=sparse)
        self.take = jax.jit(self.step, out_shardings=(self.layout, None))

    def start(self):
        with jax.set_mesh(self.mesh):
            return jax.jit(self.initialise, out_shardings=self.layout)(0)

    def compile(self, batch):
        """The step of a run, which reuses the state's memory, for a batch of these shapes."""
        return jax.jit(self.step, out_shardings=(self.layout, None), donate_argnums=0).lower(
            self.abstract, batch).compile()

    def steps(self, state, first, count):
        """The state after some steps, and the metrics of the last."""
        with jax.set_mesh(self.mesh):
            for step in range(first, first + count):
                data = jax.device_put(batch(step), batch_sharding(self.mesh))
                state, metrics = self.take(state, data)
        return state, metrics


@functools.cache
def alone(**options):
    """Three steps on one device."""
    training = Training(ONE, **options)
    return jax.device_get(training.steps(training.start(), 0, 3))


def check(shards, fsdp=False, **options):
    training = Training(shards, fsdp=fsdp, **options)
    ours = training.steps(training.start(), 0, 3)
    theirs = alone(**options)
    for (path, array), other in zip(jax.tree_util.tree_leaves_with_path(ours),
                                    jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(array, other, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    return training, ours[0]


@pytest.mark.slow
def test_sparse_steps_over_rows_columns_and_replicas():
    """With the backbone split too; every array lies where the rules say."""
    training, state = check(Shards(2, 2, 2), fsdp=True, sparse=True)
    table = state.params['layers'][0]['memory']['values']
    assert {shard.data.shape for shard in table.addressable_shards} == {(32, 8)}
    inner = state.optimizer[1].inner_states
    for moment in inner['values'].inner_state.moments:
        moment = moment['layers'][0]['memory']['values']
        assert moment.sharding == table.sharding
    assert state.last_selected[0].addressable_shards[0].data.shape == (32,)
    kernel = state.params['layers'][0]['feed_forward']['up']['kernel']
    assert kernel.addressable_shards[0].data.shape == (8, 16)
    assert int(np.sum(state.last_selected[0] == 2)) > 0


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [False, True])
def test_steps_of_muon_whose_matrices_devices_share(fsdp, monkeypatch):
    """Thirteen matrices of one shape, two for most of eight devices."""
    shared, constrain = [], muon.with_sharding_constraint

    def watched(stack, spec):
        shared.append((len(stack), spec))
        return constrain(stack, spec)

    monkeypatch.setattr(muon, 'with_sharding_constraint', watched)
    check(Shards(2, 2, 2), fsdp=fsdp, sparse=False, optimizer='muon',
          model=dataclasses.replace(MODEL, layers=2))
    assert set(shared) == {(13, P(OWN.names)), (13, P())}


def test_a_split_word_embedding_is_gathered_in_the_compute_dtype():
    training = Training(Shards(8), False, fsdp=True,
                        model=dataclasses.replace(MODEL, dtype='bfloat16'))
    with jax.set_mesh(training.mesh), jax.numpy_dtype_promotion('standard'):
        program = str(jax.make_jaxpr(training.step)(training.abstract, batch(0)))
    constraints = re.findall(r':(.*)\[40,16\] = sharding_constraint', program)
    assert set(constraints) == {'bf16'}     # of it, and of its gradient


@pytest.mark.slow
def test_sparse_steps_of_a_shared_table_in_parts_and_rematerialised():
    check(Shards(2, 2, 2), sparse=True, accumulation_steps=2, model=SHARED)


@pytest.mark.parametrize('shards', [ONE, Shards(2, 2, 2)], ids=['one', 'eight'])
def test_no_temporary_is_of_table_size(shards):
    """S = 2²⁴ and 2,048 tokens: of the whole training step, on each device."""
    memory = dataclasses.replace(MODEL.memory, sub_keys=4096, value_width=64)
    training = Training(shards, sparse=True,
                        model=dataclasses.replace(MODEL, memory=memory))
    shapes = {name: jax.ShapeDtypeStruct((2048 // LENGTH, *array.shape[1:]), array.dtype,
                                         sharding=batch_sharding(training.mesh))
              for name, array in batch(0).items()}
    with jax.set_mesh(training.mesh):
        compiled = training.compile(shapes)
    table = 2 ** 24 * memory.value_width * 4
    parts = shards.rows * shards.columns
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= 3 * table // parts       # values and moments in place
    assert analysis.temp_size_in_bytes < table / parts / 10
    largest = max(math.prod(map(int, shape.split(','))) for shape in re.findall(
        r'all-(?:gather|reduce|to-all)[^\n]*?f32\[([\d,]+)\]', compiled.as_text()) or ['1'])
    assert largest < 2 ** 24


@pytest.mark.parametrize('sparse, shards', CASES)
def test_three_steps_equal_those_of_one_device(sparse, shards):
    check(shards, sparse=sparse)


@pytest.mark.parametrize('name, accumulation_steps', [('rowwise_adam', 2), *(
    pytest.param(name, steps, marks=pytest.mark.slow) for name, steps in (
        ('sgd', 1), ('sgd', 2), ('rowwise_adam', 1), ('rowwise_adagrad', 1),
        ('rowwise_adagrad', 2)))])
def test_three_steps_of_each_optimizer(name, accumulation_steps):
    check(Shards(2, 2, 2), sparse=True, values_optimizer=name, accumulation_steps=accumulation_steps)


@pytest.mark.slow
def test_bfloat16_tables_are_rounded_alike_on_every_layout():
    """The same bits of noise: what differs is the gradient's last bits, in few places."""
    memory = dataclasses.replace(MODEL.memory, values_dtype='bfloat16', weights_dtype='bfloat16')
    model = dataclasses.replace(MODEL, memory=memory)
    tables = []
    for shards in (ONE, Shards(2, 2, 2)):
        training = Training(shards, sparse=True, model=model)
        state, _ = training.steps(training.start(), 0, 3)
        tables.append(np.asarray(state.params['layers'][0]['memory']['values'], np.float32))
    np.testing.assert_allclose(*tables, atol=2e-2)
    assert np.mean(tables[0] == tables[1]) > .99


def test_a_checkpoint_is_the_same_on_every_layout(tmp_path):
    """Saved on 2 × 4, restored bit for bit on 4 × 2, 1 × 8 and one device."""
    start = Training(Shards(2, 2, 2), sparse=True)
    state = start.start()
    expected = jax.device_get(state)
    save(tmp_path, state)
    for shards in (Shards(4, 2, 1), Shards(1, 1, 8), ONE):
        like = Training(shards, sparse=True)
        restored = restore(tmp_path, like)
        for array, other, abstract in zip(*map(jax.tree.leaves, (restored, expected,
                                                                 like.abstract)), strict=True):
            np.testing.assert_array_equal(array, other)
            assert array.sharding.is_equivalent_to(abstract.sharding, array.ndim)


@pytest.mark.slow
def test_a_run_goes_on_alike_on_every_layout(tmp_path):
    """Two steps on 2 × 4, the third on 4 × 2, 1 × 8 and one device."""
    start = Training(Shards(2, 2, 2), sparse=True)
    state, _ = start.steps(start.start(), 0, 2)
    save(tmp_path, state)
    theirs, _ = alone(sparse=True)
    for shards in (Shards(4, 2, 1), Shards(1, 1, 8), ONE):
        training = Training(shards, sparse=True)
        ours, _ = training.steps(restore(tmp_path, training), 2, 1)
        for array, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(array, other, atol=1e-5)


def save(folder, state):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(state, {'data': 0})
    checkpoints.close()


def restore(folder, training):
    checkpoints = Checkpoints(folder, keep=1)
    with jax.set_mesh(training.mesh):
        step, _ = checkpoints.newest()
        state = checkpoints.restore(step, training.abstract)
    checkpoints.close()
    return state
