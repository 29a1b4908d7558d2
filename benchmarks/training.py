"""Training steps of BERT-base, BERT-base with two memories of 512² slots, and BERT-large.

    python -m benchmarks.training [--batch=32] [--length=512]

One device, random tokens, bfloat16 compute over float32 parameters, Adam, dropout 0.1 (attention
dropout 0, so that attention can be fused; the last row shows what 0.1 costs), without the norms of
the update, which one step in `log.norms_every` takes. Prints the time of a step, tokens per second,
the share of the bfloat16 matrix rate measured in the same run, and the ratios that matter: with
memories to without, and to BERT-large. As in training, no step waits for the host to see the one
before. About two minutes, most of them compilation, on 16 cores.
"""

import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from pkm_jax.configs import bert_base_pkm, bert_large
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.models.interface import table_paths
from pkm_jax.optimizers.build import make_optimizer
from pkm_jax.training.state import initial_state, model_graph
from pkm_jax.training.step import train_step

BATCH = flags.DEFINE_integer('batch', 32, 'Sequences a step.')
LENGTH = flags.DEFINE_integer('length', 512, 'Tokens a sequence.')
CALLS, RUNS = 10, 5


def seconds_of(function) -> float:
    """Seconds of `function()`: the median of RUNS timings of CALLS calls, after a warm-up."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = function()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times[1:])


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on random data."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16)
                   for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return 2 * size ** 3 / seconds_of(lambda: multiply(left, right))


def random_batch(rows: int, length: int, vocab_size: int, predictions: int) -> dict:
    rng = np.random.default_rng(0)

    def words(columns):
        return rng.integers(5, vocab_size, (rows, columns), dtype=np.int32)

    batch = {'tokens': words(length), 'segments': np.zeros((rows, length), np.int32),
             'lengths': np.full(rows, length, np.int32), 'mlm_labels': words(predictions),
             'mlm_positions': np.sort(rng.integers(0, length, (rows, predictions), np.int32)),
             'mlm_weights': np.ones((rows, predictions), np.float32)}
    return jax.device_put(batch)


def compiled(config):
    """What makes the state of a model, its training step, a batch, and the operations per token."""
    predictions = config.data.max_predictions * LENGTH.value // config.data.length
    config.train.update(batch=BATCH.value)
    config.data.update(length=LENGTH.value, max_predictions=predictions)
    run = runs_of(config)[0].with_vocabulary(30522)
    model = run.model
    optimizer = make_optimizer(run.train, run.train.steps, table_paths(model.memories),
                               model.is_backbone)
    initialise = jax.jit(functools.partial(initial_state, config=model, optimizer=optimizer,
                                           track_dead=False))
    step = jax.jit(functools.partial(
        train_step, task=run.task, graph=model_graph(model), sites=model.memories,
        optimizer=optimizer, all_norms=False), donate_argnums=0)
    batch = random_batch(BATCH.value, LENGTH.value, 30522, predictions)
    return (initialise.lower(np.uint32(0)).compile(),
            step.lower(jax.eval_shape(initialise, np.uint32(0)), batch,
                       np.uint32(0)).compile(), batch,
            run.flops_per_step / run.tokens_per_step)


def seconds_of_step(initialise, step, batch) -> float:
    state, seed = initialise(np.uint32(0)), jax.device_put(np.uint32(0))

    def take():
        nonlocal state
        state, metrics = step(state, batch, seed)
        return metrics

    return seconds_of(take)


def variant(config, placement: str, attention_dropout: float = 0.):
    config.model.attention_dropout = attention_dropout
    config.memory.update(placement=placement, layers=(4, 8) if placement == 'add' else ())
    return config


def main(_) -> None:
    rate = matmul_rate()
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {BATCH.value} × {LENGTH.value} '
          f'tokens; bfloat16 matrix product {rate / 1e12:.0f} TFLOP/s')
    configs = {
        'BERT-base': variant(bert_base_pkm.get_config(), 'none'),
        'BERT-base + 2 memories': variant(bert_base_pkm.get_config(), 'add'),
        'BERT-large': variant(bert_large.get_config(), 'none'),
        'BERT-base, attention dropout': variant(bert_base_pkm.get_config(), 'none', .1)}
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(configs, pool.map(compiled, configs.values())))
    seconds = {}
    for name, (initialise, step, batch, flops) in programs.items():
        seconds[name] = seconds_of_step(initialise, step, batch)
        tokens = BATCH.value * LENGTH.value / seconds[name]
        print(f'{name:30} {seconds[name] * 1e3:8.2f} ms {tokens:12,.0f} tokens/s   '
              f'{tokens * flops / rate:.2f} of the matrix rate', flush=True)
    with_memories = seconds['BERT-base + 2 memories']
    print(f'speed with memories: {seconds["BERT-base"] / with_memories:.2f} × BERT-base, '
          f'{seconds["BERT-large"] / with_memories:.2f} × BERT-large')


if __name__ == '__main__':
    app.run(main)
