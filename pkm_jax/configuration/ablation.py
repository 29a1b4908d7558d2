"""The section `ablation`: over what the runs of a configuration vary, and on which budget."""

import dataclasses
from typing import Any

from pkm_jax.fields import check_settings, setting
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A grid over fields of a configuration and seeds; `pkm_jax.ablate` trains its cells."""
    axes: tuple[Any, ...] = setting(
        (), "fields and their values, such as (('memory.top_k', (8, 32)),): each of `runs` has a "
        'cell for every combination')
    sample: int = setting(0, 'combinations drawn at random; 0: all', least=0)
    sample_seed: int = setting(0, 'of that draw', least=0)
    seeds: tuple[int, ...] = setting((0,), 'each cell is trained once for each')
    once: tuple[str, ...] = setting(
        (), 'names of `runs` that are trained once, with the seed of the configuration: what the '
        'cells start from')
    budget: str = setting(
        'own', "what cells that no other starts from have in common: 'own': nothing, each has "
        "train.steps; 'steps' or 'compute' (matrix products) of all their training, that of the "
        'runs they start from included: train.steps are raised to the greatest of them',
        choices=('own', 'steps', 'compute'))
    refresh_batches: int = setting(
        0, 'training batches by which the values of a finished cell are refreshed, to measure what '
        'outdated slots cost, and as many to choose the step; then what its loss rises by without '
        'reads; 0: none is measured', least=0)

    def __post_init__(self) -> None:
        check_settings(self, 'ablation')
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise Refusal(f'ablation.seeds = {self.seeds}: give one or more, each once.')
        for axis in self.axes:
            if not (isinstance(axis, tuple) and len(axis) == 2 and isinstance(axis[0], str)
                    and isinstance(axis[1], tuple) and axis[1]):
                raise Refusal(f'ablation.axes has {axis!r}: each axis is a field and a tuple of '
                              f"its values, such as ('memory.top_k', (8, 32)).")
