"""The first step of training in numbers that were written down once."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import flatten, table_paths
from pkm_jax.optimizers.build import OptimizerConfig, make_optimizer
from pkm_jax.tasks.masked_lm import MaskedLM
from pkm_jax.training.state import initial_state, model_graph
from pkm_jax.training.step import train_step

GOLDEN = Path(__file__).with_name('golden_step.json')
ADVICE = f'''The first step of training gives other numbers than {GOLDEN.name} holds.
If nothing was to change them, this is a bug: look for what differs in initialisation, masks of
dropout, order of keys, loss or optimizer. If they moved on purpose, say why in the commit and write
them anew: python -m tests.training.test_golden'''
pytestmark = pytest.mark.usefixtures('compile_once')


def first_steps(updates: str) -> dict[str, float]:
    """Metrics of the first two steps of a small BERT with a memory, all parts in use."""
    model = BertConfig(
        vocab_size=40, layers=2, width=16, attention_heads=2, feed_forward_width=16, max_length=8,
        memory_layers=(1,), placement='add', memory=MemoryConfig(
            sub_keys=5, heads=2, top_k=2, query_width=6, input_dropout=.1, query_dropout=.1,
            value_dropout=.1))
    task, sparse = MaskedLM(length=8, max_predictions=3), updates == 'sparse'
    optimizer = make_optimizer(OptimizerConfig(warmup=2), 10, table_paths(model.memories),
                               model.is_backbone, sparse)
    state = jax.jit(functools.partial(initial_state, config=model, optimizer=optimizer,
                                      track_dead=False))(np.uint32(3))
    step = jax.jit(functools.partial(
        train_step, task=task, graph=model_graph(model), model=model, optimizer=optimizer,
        seed=np.uint32(3), accumulation_steps=2, sparse=sparse))
    rng = np.random.default_rng(0)
    batch = {'tokens': rng.integers(5, 40, (8, 8), np.int32),
             'segments': np.zeros((8, 8), np.int32), 'lengths': rng.integers(4, 9, 8, np.int32),
             'mlm_positions': rng.integers(0, 4, (8, 3), np.int32),
             'mlm_labels': rng.integers(5, 40, (8, 3), np.int32),
             'mlm_weights': np.float32(np.arange(3)[None] < rng.integers(1, 4, (8, 1)))}
    values = {}
    for number in (1, 2):
        state, metrics = step(state, batch)
        values |= {f'{number}/{name}': float(value) for name, value in flatten(metrics).items()}
    return values


@pytest.mark.parametrize('updates', ['dense', 'sparse'])
def test_first_steps_give_the_numbers_written_down(updates):
    golden = json.loads(GOLDEN.read_text())[updates]
    found = first_steps(updates)
    assert found.keys() == golden.keys(), ADVICE
    for name, value in golden.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-9), f'{name}. {ADVICE}'


if __name__ == '__main__':
    jax.config.update('jax_default_matmul_precision', 'highest')
    GOLDEN.write_text(json.dumps(
        {updates: first_steps(updates) for updates in ('dense', 'sparse')}, indent=1) + '\n')
