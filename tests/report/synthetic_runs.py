"""Run folders as training writes them, with slot counts that are drawn."""

import json
import math
import re

import numpy as np

from pkm_jax.memory.usage import SlotCounts, uniform_ceiling, usage_metrics
from pkm_jax.report.runs import SlotAccess, read_run

EVAL_TOKENS = 8192
MASKED = {'name': 'Masked-LM loss', 'unit': 'nats',
          'meaning': 'mean cross-entropy of the masked tokens'}


class SlotDraws:
    """Slot reads of heads that prefer some sub-keys: `skew` 0 is uniform, 1 has favourites."""

    def __init__(self, skew, side, heads, k, seed, tokens=EVAL_TOKENS):
        rng = np.random.default_rng(seed)
        self.side, self.heads, self.k, self.tokens = side, heads, k, tokens
        self.slots = np.empty((tokens, heads, k), np.int64)
        for head in range(heads):
            halves = [np.exp(-skew * 6 * rng.random(side)) for _ in range(2)]
            scores = np.log(np.outer(*halves).ravel() + 1e-12)
            for token in range(0, tokens, 512):
                noise = rng.gumbel(size=(min(512, tokens - token), side**2)).astype(np.float32)
                best = np.argpartition(-(scores + noise), k, axis=1)[:, :k]
                order = np.argsort(-np.take_along_axis(scores + noise, best, 1), axis=1)
                self.slots[token : token + 512, head] = np.take_along_axis(best, order, 1)
        self.weights = rng.dirichlet(np.linspace(4, 0.5, k), size=(tokens, heads))

    def access(self, tokens=None):
        slots, weights = self.slots[:tokens], self.weights[:tokens]
        size = self.side**2
        return SlotAccess(
            np.bincount(slots.ravel(), minlength=size).astype(np.int32),
            np.bincount(slots[:, :, 0].ravel(), minlength=size).astype(np.int32),
            np.bincount(slots.ravel(), weights.ravel(), minlength=size).astype(np.float32),
        )

    def metrics(self, tokens=None):
        access = self.access(tokens)
        size = self.side**2
        return usage_metrics(SlotCounts(access.count, access.top1, access.mass)) | {
            'ceiling': uniform_ceiling(size, tokens or self.tokens, self.heads),
            'slots': size,
            'heads': self.heads,
            'k': self.k,
        }

    def curve(self):
        points = [2**n for n in range(6, 14) if 2**n <= self.tokens]
        metrics = [self.metrics(tokens) for tokens in points]
        return [
            [t, m['top_1_usage'], m['top_k_usage'], m['ceiling']]
            for t, m in zip(points, metrics, strict=True)
        ]


def make_run(
    folder,
    *,
    placement='none',
    init_from='',
    skews=(),
    layers=('2',),
    steps=100,
    losses=(9.0, 6.0),
    side=24,
    heads=2,
    k=4,
    seed=0,
    tokens=EVAL_TOKENS,
    evals=4,
    planned=None,
    loss_name=MASKED,
):
    """Writes a run folder as training does; `skews` are those of each evaluation."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    config = {
        'init_from': init_from,
        'train': {'steps': planned or steps, 'warmup_steps': 3},
        'memory': {'placement': placement, 'layers': [int(layer) for layer in layers]},
    }
    (folder / 'config.json').write_text(json.dumps(config))
    start = 1.7e9 + seed
    lines = [{'kind': 'start', 'step': 0, 'tokens': 0, 'time': start, 'parameters': 4_712_345,
              'loss_name': loss_name, 'lower_is_better': ['loss', 'perplexity'],
              'memories': {layer: f'layer {layer}' for layer in layers
                           if placement != 'none'}}]
    first, last = losses

    def loss(step):
        return last + (first - last) * math.exp(-5 * step / steps)

    draws = {}
    for step in range(1, steps + 1):
        record = {'step': step, 'tokens': 2048 * step, 'time': start + step}
        noisy = loss(step) + rng.normal(0, 0.12)
        lines.append(
            record | {'kind': 'train', 'loss': noisy, 'accuracy': 0.2, 'tokens_per_second': 8123.0}
        )
        if step % (steps // evals) == 0:
            number = step // (steps // evals) - 1
            record |= {
                'kind': 'eval',
                'loss': loss(step),
                'accuracy': 0.21,
                'perplexity': math.exp(loss(step)),
            }
            record['eval_tokens'] = tokens
            if placement != 'none':
                skew = skews[min(number, len(skews) - 1)]
                draws = {x: SlotDraws(skew, side, heads, k, seed + int(x), tokens) for x in layers}
                record['memory'] = {layer: draw.metrics() for layer, draw in draws.items()}
            lines.append(record)
    for layer, draw in draws.items():
        lines[-1]['memory'][layer]['curve'] = draw.curve()
        access = draw.access()
        np.savez(
            folder / f'slot_counts_{layer}.npz',
            count=access.count,
            top1=access.top1,
            mass=access.mass,
        )
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def make_quickstart(folder, *, added=0.3, replaced=1.4, **kwargs):
    """Three runs such as the quickstart has; `added` and `replaced` are the skews at the end."""
    make_run(folder / 'pretrain', losses=(9.0, 6.4), seed=1)
    make_run(
        folder / 'add',
        placement='add',
        init_from=str(folder / 'pretrain'),
        losses=(6.5, 5.6),
        seed=2,
        skews=(1.5, 0.8, 0.5, added),
        **kwargs,
    )
    make_run(
        folder / 'replace',
        placement='replace',
        losses=(9.0, 6.3),
        seed=3,
        skews=(0.8, 1.1, 1.3, replaced),
        **kwargs,
    )
    return folder


def cells(page, label):
    """The cells of the table's row of this label, all layers one after the other."""
    rows = re.findall(rf'<th scope="row">{re.escape(label)}</th>(.*?)</tr>', page)
    return [cell for row in rows for cell in re.findall('<td>(.*?)</td>', row)]


def usage(folder, run, key='top_1_usage', layer='2'):
    return read_run(folder / run).evals[-1]['memory'][layer][key]


def edit_evals(folder, change):
    """Rewrites a run's metrics with `change` applied to each evaluation; None drops it."""
    file = folder / 'metrics.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [change(record) if record['kind'] == 'eval' else record for record in records]
    file.write_text(''.join(json.dumps(record) + '\n' for record in kept if record))
