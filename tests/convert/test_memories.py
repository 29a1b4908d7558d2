"""Memories of other layouts compute here what their own equations say."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from pkm_jax.convert import huggingface
from pkm_jax.convert.memories import add_memories
from pkm_jax.memory.layer import ProductKeyMemory
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'goldens'
H, N, HALF, D, K = 2, 4, 3, 16, 2


def xlm_memory(batch_norm: bool, flat: bool, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    keys = normal(H, 2, N, HALF)
    memory = {'keys': keys.reshape(2 * H * N, HALF) if flat else keys,
              'values.weight': normal(N * N, D),
              'query_proj.query_mlps.0.weight': normal(H * 2 * HALF, D),
              'query_proj.query_mlps.0.bias': normal(H * 2 * HALF)}
    if batch_norm:
        memory |= {'query_proj.query_mlps.1.' + name: normal(H * 2 * HALF)
                   for name in ('weight', 'bias', 'running_mean')}
        memory['query_proj.query_mlps.1.running_var'] = 0.5 + normal(H * 2 * HALF) ** 2
        memory['query_proj.query_mlps.1.num_batches_tracked'] = np.array(7)
    return memory


def read_by_definition(memory: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """docs/method.md, section 1 over all N² slots, from the names and shapes of the source."""
    query = x @ memory['query_proj.query_mlps.0.weight'].T + memory['query_proj.query_mlps.0.bias']
    norm = {name.rsplit('.', 1)[1]: array for name, array in memory.items() if 'mlps.1' in name}
    if norm:
        query = (query - norm['running_mean']) / np.sqrt(norm['running_var'] + 1e-5)
        query = query * norm['weight'] + norm['bias']
    keys = memory['keys'].reshape(H, 2, N, HALF)
    read = np.zeros((len(x), D))
    for token, vector in enumerate(query.reshape(len(x), H, 2 * HALF)):
        for head in range(H):
            first = keys[head, 0] @ vector[head, :HALF]
            second = keys[head, 1] @ vector[head, HALF:]
            scores = (first[:, None] + second[None]).reshape(-1)
            best = np.argsort(-scores)[:K]
            weights = np.exp(scores[best] - scores[best].max())
            read[token] += weights / weights.sum() @ memory['values.weight'][best]
    return read


def write(path: Path, **memories: dict[str, np.ndarray]) -> Path:
    save_file({f'{prefix}.{name}': array for prefix, memory in memories.items()
               for name, array in memory.items()}, path)
    return path


@pytest.fixture
def backbone():
    return huggingface.load(GOLDENS / 'masked_lm')


@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('flat', [True, False], ids=['flat', 'xlm'])
def test_a_memory_computes_what_it_did(tmp_path, backbone, batch_norm, flat):
    source = xlm_memory(batch_norm, flat)
    path = write(tmp_path / 'memory.safetensors', **{'memories.1_after': source})
    joined = add_memories(backbone, path, 'add', K)
    config = joined.config
    assert config.memory_layers == (1,) and config.placement == 'add'
    assert dataclasses.replace(config, memory_layers=(), placement='none',
                               memory=backbone.config.memory) == backbone.config

    memory = ProductKeyMemory(config.memory, D, rngs=nnx.Rngs(0))
    nnx.update(memory, jax.tree.map(jnp.asarray, joined.params['layers'][1]['memory']))
    if batch_norm:
        statistics = joined.statistics['layers'][1]['memory']
        nnx.update(memory, jax.tree.map(jnp.asarray, statistics))
    x = np.random.default_rng(1).normal(size=(5, D)).astype(np.float32)
    found = memory(jnp.asarray(x), deterministic=True)
    np.testing.assert_allclose(found, read_by_definition(source, x), atol=1e-5, rtol=1e-5)


def test_memories_replace_layers_and_go_out_again(tmp_path, backbone):
    path = write(tmp_path / 'memories.safetensors', **{
        'layers.0.feed_forward': xlm_memory(True, True, 0),
        'layers.1.feed_forward': xlm_memory(True, True, 1),
        'head': {'weight': np.zeros(2, np.float32)}})
    joined = add_memories(backbone, path, 'replace', K)
    assert joined.config.memory_layers == (0, 1)
    assert joined.log.left['head.weight'] == 'not of a memory'
    assert joined.log.left['layers/0/feed_forward/up/kernel'] == 'a memory is in its place'
    huggingface.save(tmp_path / 'out', joined.config, joined.params, joined.statistics)
    back = huggingface.load(tmp_path / 'out')
    assert back.config == joined.config
    np.testing.assert_array_equal(back.params['layers'][1]['memory']['values'],
                                  xlm_memory(True, True, 1)['values.weight'])


def test_a_projection_without_bias_gets_zeros(tmp_path, backbone):
    memory = xlm_memory(False, True)
    del memory['query_proj.query_mlps.0.bias']
    memory['query_proj.weight'] = memory.pop('query_proj.query_mlps.0.weight')
    path = write(tmp_path / 'memory.safetensors', **{'layers.1': memory})
    joined = add_memories(backbone, path, 'add', K)
    (new,) = joined.log.new
    assert new.path == 'layers/1/memory/query/bias' and new.shape == (H * 2 * HALF,)
    assert not joined.params['layers'][1]['memory']['query']['bias'].any()
    sources = {entry.path: entry.source for entry in joined.log.taken}
    assert sources['layers/1/memory/codebooks'] == 'layers.1.keys'


def test_layers_can_be_given(tmp_path, backbone):
    path = write(tmp_path / 'memory.safetensors', memory=xlm_memory(False, False))
    with pytest.raises(Refusal, match="'memory.' is not clear.*--memory_layers"):
        add_memories(backbone, path, 'add', K)
    assert add_memories(backbone, path, 'add', K, [0]).config.memory_layers == (0,)
    with pytest.raises(Refusal, match=r'1 memories.*\(0, 1\)'):
        add_memories(backbone, path, 'add', K, [0, 1])
    with pytest.raises(Refusal, match='memory.layers'):
        add_memories(backbone, path, 'add', K, [2])


@pytest.mark.parametrize('change, words', [
    (lambda memory: memory.update({'value_proj.weight': np.zeros((D, D), np.float32)}),
     'value_proj.weight'),
    (lambda memory: memory.update({'values.weight': np.zeros((15, D), np.float32)}), 'square'),
    (lambda memory: memory.update({'keys': np.zeros((H, 2, N + 1, HALF), np.float32)}), 'neither'),
    (lambda memory: memory.update({'values.weight': np.zeros((16, 5), np.float32)}),
     "no '.*memory/output/kernel'|asks for"),
    (lambda memory: memory.pop('values.weight'), 'holds no memory'),
    (lambda memory: memory.pop('query_proj.query_mlps.0.weight'), 'query_mlps.0.bias'),
    (lambda memory: memory.update(
        {'query_proj.query_mlps.0.weight': np.zeros((H * 2 * HALF, 8), np.float32)}), 'asks for'),
    (lambda memory: memory.pop('query_proj.query_mlps.1.bias'), 'no .*query_mlps.1.bias'),
    (lambda memory: memory.update({'query_proj.query_mlps.1.bias': np.zeros(3, np.float32)}),
     'asks for'),
])
def test_what_does_not_fit_is_refused(tmp_path, backbone, change, words):
    memory = xlm_memory(True, False)
    change(memory)
    path = write(tmp_path / 'memory.safetensors', **{'layers.1': memory})
    with pytest.raises(Refusal, match=words):
        add_memories(backbone, path, 'add', K)


def test_memories_of_different_sizes_are_refused(tmp_path, backbone):
    path = write(tmp_path / 'memories.safetensors', **{
        'layers.0': xlm_memory(True, False), 'layers.1': xlm_memory(False, False)})
    with pytest.raises(Refusal, match='differ in size'):
        add_memories(backbone, path, 'add', K)


def test_a_model_with_memories_takes_no_more(tmp_path):
    path = write(tmp_path / 'memory.safetensors', **{'layers.1': xlm_memory(True, False)})
    with pytest.raises(Refusal, match='memories already'):
        add_memories(huggingface.load(GOLDENS / 'memory_added'), path, 'add', K)
