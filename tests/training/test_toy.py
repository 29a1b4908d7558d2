"""A model and a task that the package does not know, through the real loop on eight devices.

That training, evaluation, layouts and plans know nothing of BERT is shown by what is used here:
dataclasses that have what models/interface.py and tasks/interface.py say.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from pkm_jax.checkpoints import store
from pkm_jax.configuration.run import Log, Parts, Run, Tables, Train
from pkm_jax.data.examples import ArraySpec
from pkm_jax.memory.layer import MemoryConfig, ProductKeyMemory
from pkm_jax.mesh import make_mesh
from pkm_jax.models.interface import MemorySite, path_of
from pkm_jax.planning import chips
from pkm_jax.planning.estimate import STEP, estimate
from pkm_jax.report.report import write_report
from pkm_jax.tasks.interface import LossName, Outcome
from pkm_jax.training import loop, start
from pkm_jax.training.layout import lay_out, lay_out_here
from pkm_jax.training.program import make_program
from pkm_jax.training.state import batch_sharding
from tests.training.runs import killed_after

pytestmark = pytest.mark.usefixtures('compile_once')
WIDTH = 4


class Toy(nnx.Module):
    """Ten lines of somebody's model, with memory and table under names of their own."""

    def __init__(self, config, rngs):
        self.encode = nnx.Linear(1, WIDTH, rngs=rngs)
        self.reader = nnx.Dict(memory=ProductKeyMemory(config.memory, WIDTH, rngs=rngs))
        self.bank = self.reader.memory.values
        self.decode = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x, deterministic, delta):
        states = self.encode(x)
        read, reads = self.reader.memory.read(states, deterministic=deterministic, delta=delta)
        self.reader.memory.update_batch_stats(reads.batch_stats)
        return self.decode(states + read), reads


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    memory: MemoryConfig = MemoryConfig(sub_keys=8, heads=2, top_k=2, query_width=4)
    vocab_size: int = 0
    max_length: int = 1
    dtype: str = 'float32'
    word_embedding: tuple = ()

    def with_vocabulary(self, words):
        return self

    def build(self, rngs):
        return Toy(self, rngs)

    @property
    def memories(self):
        return {'bank': MemorySite(self.memory, ('reader', 'memory'), ('bank',), WIDTH,
                                   'the bank')}

    def is_backbone(self, path):
        return path.startswith(('encode', 'decode'))

    def unseen(self):
        return {}

    def fast_paths(self, platform):
        return []

    def savings(self):
        return []

    def forward_flops(self, length, predictions):
        return 100

    def activation_bytes(self, sequences, length, predictions):
        return 100 * sequences


class Numbers:
    """Records that are numbers."""
    fingerprint, vocab_size, vocab_path = 'numbers', 0, ''

    def num_records(self, split):
        return {'train': 64, 'validation': 24}[split]

    def records(self, split):
        return self

    def __getitems__(self, numbers):
        return [{'x': number / 64} for number in numbers]


@dataclasses.dataclass(frozen=True)
class Examples:
    arrays = {'x': ArraySpec((1,), np.float32), 'y': ArraySpec((1,), np.float32),
              'known': ArraySpec((), np.float32)}
    identity = {}

    def __call__(self, record, epoch, number):
        x = record['x']
        return {'x': np.array([x]), 'y': np.array([np.sin(6 * x)]), 'known': 1.}


@dataclasses.dataclass(frozen=True)
class Regression:
    """Of a sine, by least squares."""
    length: int = 1
    buckets: tuple = (1,)
    workers: int = 0
    vocab_size: int = 0
    loss_name = LossName('Squared error', '', 'mean square of the error')
    lower_is_better = 'loss', 'mean_error'

    def check(self, model):
        pass

    def prepare(self, vocabulary, log):
        return Numbers()

    def examples(self, data, seed):
        return Examples()

    @property
    def arrays(self):
        return Examples.arrays

    def terms(self, batch):
        return jnp.sum(batch['known'])

    def real(self, batch):
        return batch['known'] > 0

    def outcome(self, model, batch, *, deterministic, rngs=None, deltas=None):
        guess, reads = model(batch['x'], deterministic, (deltas or {}).get('bank'))
        error = (guess - batch['y'])[:, 0] * batch['known']
        return Outcome(jnp.sum(error ** 2), {'absolute': jnp.sum(jnp.abs(error))},
                       {'bank': reads}, {'guess': guess[:, 0], 'y': batch['y'][:, 0]})

    def metrics(self, sums):
        return {'loss': sums['loss'] / sums['terms'], 'mean_error': sums['absolute'] / sums['terms']}

    def evaluation(self, sums, outputs, data, split):
        """Pearson's r too, which no sums over batches give."""
        assert len(outputs['guess']) == 24      # each example once, though batches are of 16
        values = {name: float(value) for name, value in self.metrics(sums).items()}
        return values | {'r': float(np.corrcoef(outputs['guess'], outputs['y'])[0, 1])}

    def predictions(self):
        return 0


def run(folder, **tables):
    return Run(model=ToyConfig(), task=Regression(), workdir=str(folder), name='toy',
               tables=Tables(dead_after=3, **tables),
               train=Train(steps=40, batch=16, warmup=2, learning_rate=.02,
                           values_learning_rate=.02),
               log=Log(every=10, eval_every=20, eval_batches=2, checkpoint_every=20))


def train(one):
    return loop.train(one, lay_out_here(one))


def weights(folder):
    return {name: np.asarray(array)
            for name, array in store.read_weights(store.newest(folder)).items()}


@pytest.mark.parametrize('updates', [pytest.param('dense', marks=pytest.mark.slow), 'sparse'])
def test_it_trains_evaluates_stops_and_resumes(updates, tmp_path, capsys):
    straight = train(run(tmp_path / 'straight', updates=updates))
    lines = list(map(json.loads, (straight / 'metrics.jsonl').read_text().splitlines()))
    losses = [line['loss'] for line in lines if line['kind'] == 'train']
    assert losses[-1] < losses[0] / 2
    last = [line for line in lines if line['kind'] == 'eval'][-1]
    assert last['r'] > .8 and last['eval_tokens'] == 24
    assert 0 < last['memory']['bank']['top_k_usage'] <= 1 and 'dead' in last['memory']['bank']
    assert '; the bank: top-1 usage' in capsys.readouterr().out
    page = write_report(straight).read_text()
    assert 'The bank: memory' in page and '<dt>Squared error</dt>' in page
    assert 'nats' not in page.split('<tbody>')[1].split('KL')[0] and 'Masked' not in page

    with killed_after(25):
        train(run(tmp_path / 'killed', updates=updates))
    assert store.newest(tmp_path / 'killed').name == '20'
    ours, theirs = weights(train(run(tmp_path / 'killed', updates=updates))), weights(straight)
    assert 'statistics/reader/memory/query_norm/var' in ours and ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize('updates', [
    pytest.param('dense', marks=pytest.mark.slow), 'sparse'])
def test_its_table_is_split_does_not_decay_and_is_updated_by_rows(updates, tmp_path):
    """By the path that the model gives, at which no other model here has one."""
    one = run(tmp_path, updates=updates, shards=Parts(rows=2, columns=2))
    one = dataclasses.replace(one, train=dataclasses.replace(one.train, weight_decay=.5))
    layout = lay_out_here(one)
    mesh = make_mesh(layout.shards)
    with jax.set_mesh(mesh):
        program = make_program(one, one.model, layout.sparse, mesh)
        state = program.initialise(np.uint32(0))
        before = jax.device_get(state.params)
        assert state.params['bank'].sharding.spec == P('rows', 'columns')
        moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
                   if path_of(path).endswith('/bank')]
        assert [moment.sharding.spec for moment in moments] == 2 * [P('rows', 'columns')]
        batch = jax.device_put(
            {'x': np.full((16, 1), .5, np.float32), 'y': np.ones((16, 1), np.float32),
             'known': np.ones(16, np.float32)}, batch_sharding(mesh))
        for _ in range(2):      # the first rate of the schedule is 0
            state, metrics = program.take_step(state, batch, np.uint32(0), all_norms=True)
    assert ('values' in metrics['norms']['param_norm']) == (updates == 'dense')
    touched = np.any(np.asarray(state.params['bank']) != before['bank'], axis=1)
    assert 0 < sum(touched) <= 4        # one input, two heads of two reads
    codebooks = np.asarray(state.params['reader']['memory']['codebooks'])
    assert np.all(codebooks != before['reader']['memory']['codebooks'])     # they do decay


def test_a_program_without_a_cache_says_why(tmp_path, monkeypatch):
    """One of its own, which calls `loop.train`; and one whose configuration wants none."""
    monkeypatch.setattr(start, 'compilation_cache', lambda: None)
    one = run(tmp_path)
    mesh = make_mesh(lay_out(one, 8).shards)
    for cache, why in [('data/compiled', 'nobody has called'), ('', "compilation_cache = ''")]:
        lines = start.summary(dataclasses.replace(one, compilation_cache=cache),
                              lay_out(one, 8), mesh)
        assert any(f'compiled programs: not kept ({why}' in line for line in lines)


def test_it_can_be_planned(tmp_path):
    found = estimate(run(tmp_path, updates='sparse'), chips.parse('h200:8'))
    sizes = found.memory[STEP].bytes
    assert found.fits and sizes['value tables'] == 64 * WIDTH * 4
    assert sizes['optimizer state of value tables'] == 2 * 64 * WIDTH * 4
