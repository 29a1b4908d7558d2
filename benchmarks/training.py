"""Training steps of BERT-base, BERT-base with two memories of 512² slots, and BERT-large.

    python -m benchmarks.training [--batch=32] [--length=512] [--accumulation=1]

One device, random tokens, bfloat16 compute over float32 parameters, Adam, dropout 0.1 (attention
dropout 0, so that attention can be fused; the last row shows what 0.1 costs), without the norms of
the update, which one step in `log.norms_every` takes. A step has as many micro-batches of --batch
sequences as --accumulation says. Prints the time of a step, tokens per second,
the share of the bfloat16 matrix rate measured in the same run, and the ratios that matter: with
memories to without, and to BERT-large. As in training, no step waits for the host to see the one
before. About two minutes, most of them compilation, on 16 cores.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.steps import CALLS, compiled, random_batch, run_of, seconds_of, seconds_of_step
from pkm_jax.configs import bert_base_pkm, bert_large

BATCH = flags.DEFINE_integer('batch', 32, 'Sequences of a micro-batch.')
LENGTH = flags.DEFINE_integer('length', 512, 'Tokens a sequence.')
ACCUMULATION = flags.DEFINE_integer('accumulation', 1, 'Micro-batches a step.')


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on random data."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16)
                   for i in range(2))
    multiply = jax.jit(jnp.matmul)
    return 2 * size ** 3 / seconds_of(lambda: multiply(left, right))


def variant(config, placement: str, attention_dropout: float = 0., values_optimizer: str = 'adam'):
    config.model.attention_dropout = attention_dropout
    config.train.update(values_optimizer=values_optimizer,
                        gradient_accumulation_steps=ACCUMULATION.value)
    config.memory.update(placement=placement, layers=(4, 8) if placement == 'add' else ())
    return config


def main(_) -> None:
    rate = matmul_rate()
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, '
          f'{ACCUMULATION.value} × {BATCH.value} × {LENGTH.value} tokens; '
          f'bfloat16 matrix product {rate / 1e12:.0f} TFLOP/s')
    configs = {
        'BERT-base': variant(bert_base_pkm.get_config(), 'none'),
        'BERT-base + 2 memories': variant(bert_base_pkm.get_config(), 'add'),
        'BERT-base + 2, moments bf16': variant(bert_base_pkm.get_config(), 'add',
                                               values_optimizer='adam_bf16'),
        'BERT-large': variant(bert_large.get_config(), 'none'),
        'BERT-base, attention dropout': variant(bert_base_pkm.get_config(), 'none', .1)}
    batch = ACCUMULATION.value * BATCH.value
    runs = {name: run_of(config, batch, LENGTH.value) for name, config in configs.items()}
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(runs, pool.map(compiled, runs.values())))
    seconds = {}
    for name, step in programs.items():
        run = runs[name]
        seconds[name] = seconds_of_step(step, random_batch(run),
                                        max(CALLS // ACCUMULATION.value, 1))
        print(f'{name:30} {seconds[name] * 1e3:8.2f} ms '
              f'{run.tokens_per_step / seconds[name]:12,.0f} tokens/s   '
              f'{run.flops_per_step / seconds[name] / rate:.2f} of the matrix rate', flush=True)
    with_memories = seconds['BERT-base + 2 memories']
    print(f'speed with memories: {seconds["BERT-base"] / with_memories:.2f} × BERT-base, '
          f'{seconds["BERT-large"] / with_memories:.2f} × BERT-large')


if __name__ == '__main__':
    app.run(main)
