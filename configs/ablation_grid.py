r"""Both findings of the paper with error bars: one pretraining, a 2 × 2 grid, one factor at a time.

    python -m pkm_jax.ablate --config=ablation_grid:scale=small --config.data.corpus='/corpus/*.xz'
    python -m pkm_jax.ablate --config=ablation_grid:scale=small,part=factors --config.data.corpus=…
    python -m pkm_jax.ablate --config=ablation_grid:scale=small,glue=cola+sst2+mrpc+stsb \
        --config.data.corpus=… --config.finetuning.data.folder=/data/glue
    python -m pkm_jax.compile_check --config=ablation_grid:scale=base --topology=v5e:16x16

Phase 1, `pretrain`, has no memory and is trained once. Phase 2 by three seeds: {scratch,
pretrained} × {replace, add}, and beside them models without memory: `none` of as many steps, `wide`
of about the step time of a memory, by wider feed-forward layers (`pretrain_wide` is what its
pretrained ones start from). `part=factors` is, by one seed, `pretrained_add` with one setting
changed at a time.

Arguments: model=bert|causal; scale=base|small|tiny; part=grid|factors; budget=own|steps|compute
(`ablation.budget`); wide=WIDTH of the wide feed-forward layers; glue=TASK+TASK+…, on which each
cell is fine-tuned (BERT only).

| scale | model | phase 1 | phase 2 | memories |
| --- | --- | --- | --- | --- |
| tiny | 2 layers of 32 | 0.1 M tokens | 0.1 M | 16² slots in layer 1: for tests |
| small | 8 layers of 512 | 603 M tokens | 210 M | 512² slots in layers 2 and 5 |
| base | BERT-base | 262 billion tokens | 66 billion | 512² slots in layers 4 and 8 |
"""

import dataclasses

import ml_collections

from pkm_jax.configs import glue
from pkm_jax.configuration.resolve import defaults
from pkm_jax.data.glue import TASKS
from pkm_jax.refusal import Refusal

CHOICES = {'model': ('bert', 'causal'), 'scale': ('base', 'small', 'tiny'),
           'part': ('grid', 'factors'), 'budget': ('own', 'steps', 'compute')}
NOTHING = dict(placement='none', layers=())


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of everything, and what the factors are changed to."""
    model: dict
    memory: dict
    data: dict
    train: dict
    log: dict
    pretrain_steps: int
    wide: int                   # by arithmetic about as long as the memories: see tokens/s
    layers: tuple               # other layers for the memories
    sub_keys: tuple
    top_k: tuple
    refresh_batches: int


SCALES = {
    'tiny': Scale(
        model=dict(layers=2, width=32, attention_heads=2, feed_forward_width=64, max_length=32,
                   dropout=0., attention_dropout=0.),
        memory=dict(layers=(1,), sub_keys=16, heads=2, top_k=4, query_width=16, dead_after=20,
                    drift_tokens=64),
        data=dict(vocab_size=512, length=32, validation_fraction=0.05, workers=0),
        train=dict(steps=100, batch=32, warmup=10, learning_rate=1e-3, values_learning_rate=1e-2),
        log=dict(every=10, norms_every=0, eval_every=25, eval_batches=4, checkpoint_every=50,
                 keep=1),
        pretrain_steps=100, wide=96, layers=((0,), (0, 1)), sub_keys=(8, 32), top_k=(1, 8),
        refresh_batches=4),
    'small': Scale(
        model=dict(layers=8, width=512, attention_heads=8, feed_forward_width=2048, max_length=128,
                   attention_dropout=0., dtype='bfloat16'),
        memory=dict(layers=(2, 5), sub_keys=512, heads=4, top_k=32, query_width=256,
                    dead_after=500, drift_tokens=256),
        data=dict(vocab_size=16_384, length=128, validation_fraction=0.02),
        train=dict(steps=3_200, batch=512, warmup=500, learning_rate=4e-4,
                   values_learning_rate=1e-2),
        log=dict(every=50, norms_every=0, eval_every=400, eval_batches=20, checkpoint_every=1600,
                 keep=1),
        pretrain_steps=9_200, wide=3584, layers=((2,), (5,), (6, 7), (1, 3, 5)),
        sub_keys=(256, 1024), top_k=(8, 16, 64), refresh_batches=20),
    'base': Scale(
        model=dict(attention_dropout=0., dtype='bfloat16'),
        memory=dict(layers=(4, 8), dead_after=2_000, drift_tokens=256),
        data={},
        train=dict(steps=125_000, batch=1024, warmup=10_000, learning_rate=1e-4,
                   values_learning_rate=1e-3),
        log=dict(eval_every=12_500, eval_batches=20),
        pretrain_steps=500_000, wide=4608, layers=((4,), (8,), (10, 11), (2, 6, 10)),
        sub_keys=(256, 1024), top_k=(8, 16, 64), refresh_batches=50),
}


def get_config(arguments: str = '') -> ml_collections.ConfigDict:
    given = _given(arguments)
    scale, family = SCALES[given['scale']], given['model']
    config = defaults(family, 'masked_lm' if family == 'bert' else 'causal_lm')
    config.workdir = f'runs/ablation_grid_{family}_{given["scale"]}'
    config.model.update(scale.model)
    config.memory.update(scale.memory, placement='add')
    config.data.update(scale.data)
    if family == 'bert':
        config.data.max_predictions = round(0.16 * config.data.length)      # 15 % are masked
    config.train.update(scale.train)
    config.log.update(scale.log, eval_at_start=True)
    config.ablation.update(budget=given['budget'], refresh_batches=scale.refresh_batches)
    wide = dict(feed_forward_width=int(given['wide'] or scale.wide))
    if given['part'] == 'grid':
        config.runs.update(_grid(scale, wide))
        config.ablation.update(seeds=(1, 2, 3), once=('pretrain', 'pretrain_wide'))
    else:
        config.runs.update(_factors(scale, config))
        config.ablation.update(seeds=(1,), once=('pretrain',))
    if given['glue']:
        config.finetuning = _finetuning(given['glue'].split('+'), given['scale'])
    return config


def _grid(scale, wide):
    first = _first(scale)
    return {
        'pretrain': first,
        'pretrain_wide': first | dict(model=wide),
        **{f'{name}_{placement}': dict(init_from=start, memory=dict(placement=placement))
           for name, start in (('scratch', ''), ('pretrained', 'pretrain'))
           for placement in ('replace', 'add')},
        'scratch_none': dict(memory=NOTHING),
        'pretrained_none': dict(memory=NOTHING, init_from='pretrain'),
        'scratch_wide': dict(memory=NOTHING, model=wide),
        'pretrained_wide': dict(memory=NOTHING, model=wide, init_from='pretrain_wide')}


def _first(scale):
    """Phase 1; evaluated more seldom, as of it only the loss is looked at."""
    return dict(memory=NOTHING, train=dict(steps=scale.pretrain_steps),
                log=dict(eval_every=4 * scale.log['eval_every']))


def _factors(scale, config):
    """`pretrained_add`, which the grid has too, and variants of it."""
    changes = {f'layers_{"_".join(map(str, layers))}': dict(layers=layers)
               for layers in scale.layers}
    for field, values in (('sub_keys', scale.sub_keys), ('top_k', scale.top_k),
                          ('query_norm', ('none', 'layer')), ('zero_start', (True,))):
        changes |= {f'{field}_{value}'.lower(): {field: value} for value in values}
    usual = config.train.values_learning_rate
    return {
        'pretrain': _first(scale),
        'pretrained_add': dict(init_from='pretrain'),
        **{name: dict(init_from='pretrain', memory=change) for name, change in changes.items()},
        **{f'values_rate_{name}': dict(init_from='pretrain', train=dict(
            values_learning_rate=rate))
           for name, rate in (('tenth', usual / 10), ('tenfold', usual * 10))},
        'values_adam_bf16': dict(init_from='pretrain', train=dict(values_optimizer='adam_bf16')),
        **{f'values_epsilon_{epsilon:g}': dict(init_from='pretrain', train=dict(
            values_epsilon=epsilon)) for epsilon in (1e-6, 1e-8)}}


def _finetuning(tasks, scale):
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise Refusal(f'configs/ablation_grid.py: glue={"+".join(tasks)}: {unknown[0]} is none of '
                      f'{", ".join(TASKS)}.')
    config = glue.get_config('task=all')
    config.runs = {task: config.runs[task].to_dict() for task in tasks}
    config.data.length = min(config.data.length, SCALES[scale].model.get('max_length', 512))
    return config


def _given(arguments):
    given = {'model': 'bert', 'scale': 'small', 'part': 'grid', 'budget': 'own', 'wide': '',
             'glue': ''}
    for argument in filter(None, arguments.split(',')):
        name, _, value = argument.partition('=')
        if (name not in given or value not in CHOICES.get(name, (value,))
                or name == 'wide' and not value.isdecimal()):
            raise Refusal(f'configs/ablation_grid.py: {argument!r} is none of wide=WIDTH, '
                          'glue=TASK+TASK, ' + ', '.join(
                              f'{name}={"|".join(values)}' for name, values in CHOICES.items()))
        given[name] = value
    if given['glue'] and given['model'] == 'causal':
        raise Refusal('configs/ablation_grid.py: glue= with model=causal: only a BERT can be '
                      'fine-tuned.')
    return given
