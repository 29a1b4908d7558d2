r"""The paper's comparisons: where the memory sits, and what the network starts from.

    python -m pkm_jax.pretrain --config=ablation:init=scratch,placement=none
    python -m pkm_jax.pretrain --config=ablation:init=scratch,placement=replace
    python -m pkm_jax.pretrain --config=ablation:init=pretrained,placement=add,layers=4+8 \
        --config.init_from=runs/ablation/scratch-none

Arguments: init=scratch|pretrained, placement=none|replace|add, layers=I+J+… (0-based, default 4+8),
scale=base|small (small: the quickstart's model, minutes on a laptop). `init=pretrained` starts from
--config.init_from, by default the run scratch-none of the same scale.

A run of scale=small takes a minute or two on two CPU cores and ends as the quickstart's do. One of
scale=base takes what configs/bert_base_pkm.py says, a week on one H200 (without memory 0.76 of
that); how it ends has not been measured.
"""

from pkm_jax.configs import bert_base_pkm, quickstart
from pkm_jax.refusal import Refusal

CHOICES = {'init': ('scratch', 'pretrained'), 'placement': ('none', 'replace', 'add'),
           'scale': ('base', 'small')}


def get_config(arguments: str = ''):
    given = {'init': 'pretrained', 'placement': 'add', 'scale': 'base', 'layers': ''}
    for argument in filter(None, arguments.split(',')):
        name, _, value = argument.partition('=')
        if name not in given or name in CHOICES and value not in CHOICES[name]:
            raise Refusal(f'configs/ablation.py: {argument!r} is none of layers=I+J, ' + ', '.join(
                f'{name}={"|".join(values)}' for name, values in CHOICES.items()))
        given[name] = value

    if given['scale'] == 'base':
        config, folder = bert_base_pkm.get_config(), 'runs/ablation'
    else:
        config, folder = quickstart.get_config(), 'runs/ablation_small'
        config.runs = {}
    try:
        layers = tuple(map(int, filter(None, given['layers'].split('+')))) or config.memory.layers
    except ValueError:
        raise Refusal(f'configs/ablation.py: layers={given["layers"]!r} must be numbers joined '
                         f'by +, such as 4+8.') from None
    config.memory.update(placement=given['placement'],
                         layers=() if given['placement'] == 'none' else layers)
    name = f'{given["init"]}-{given["placement"]}'
    if given['layers']:
        name += '-' + given['layers']
    config.workdir = f'{folder}/{name}'
    config.init_from = f'{folder}/scratch-none' if given['init'] == 'pretrained' else ''
    return config
