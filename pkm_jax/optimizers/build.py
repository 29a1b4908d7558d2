"""The optimizer of a run: clipping, then in each group of parameters what a name stands for.

A new optimizer is a line in one of the tables here. What its state takes and how it is split are
found from its `init` (`values_state_bytes`, layout.py).
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pkm_jax.fields import check_settings, setting
from pkm_jax.memory.sparse_rows import is_rows
from pkm_jax.models.interface import path_of
from pkm_jax.optimizers.adam_bf16 import adam_bf16
from pkm_jax.optimizers.groups import groups_of, schedule
from pkm_jax.optimizers.muon import scale_by_muon
from pkm_jax.optimizers.skips import limit_loss
from pkm_jax.optimizers.sparse import (
    clip_by_global_norm,
    lazy_adam,
    rowwise_adagrad,
    rowwise_adam,
    sparse_sgd,
)
from pkm_jax.refusal import Refusal

# Gives Muon's updates the root mean square of Adam's, so that one learning rate serves both
# (Liu et al. 2025, arXiv:2502.16982).
MUON_RMS = 0.2


def _adam(config, rate, weight_decay=0.):
    return optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=weight_decay)


def _lamb(config, rate, weight_decay):
    return optax.lamb(rate, config.beta1, config.beta2, config.epsilon, weight_decay=weight_decay)


def _adafactor(config, rate, weight_decay=0.):
    """Weights decay by the learning rate too, as with the others; Optax's default leaves it out."""
    return optax.adafactor(rate, weight_decay_rate=lambda count: weight_decay * rate(count))


def _muon(config, rate, weight_decay):
    """`optax.contrib.muon` of the kernels, with the same state; its Adam looks ahead as well."""
    def kinds(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: 'muon' if path_of(path).endswith('kernel') and leaf.ndim == 2
            else 'adam', params)

    def scale_by_shape(updates, _):
        return jax.tree.map(lambda leaf: MUON_RMS * math.sqrt(max(leaf.shape)) * leaf, updates)

    return optax.partition({
        'muon': optax.chain(scale_by_muon(config.epsilon), optax.stateless(scale_by_shape),
                            optax.add_decayed_weights(weight_decay),
                            optax.scale_by_learning_rate(rate)),
        'adam': optax.adamw(rate, config.beta1, config.beta2, config.epsilon,
                            weight_decay=weight_decay, nesterov=True),
    }, kinds)


# By name what updates decayed and undecayed parameters. LAMB (You et al. 2020, arXiv:1904.00962)
# does not scale by the size of what does not decay, as in TensorFlow Addons; Muon is for matrices
# between hidden states.
BACKBONE = {
    'adam': (_adam, _adam),
    'lamb': (_lamb, _adam),
    'adafactor': (_adafactor, _adafactor),
    'muon': (_muon, _adam),
}
# By name what updates value tables: from dense gradients, and from SparseRows.
DENSE_VALUES = {
    'adam': lambda config, rate: optax.adam(rate, config.beta1, config.beta2, config.epsilon),
    'adam_bf16': lambda config, rate: adam_bf16(rate, config.beta1, config.beta2, config.epsilon),
    'sgd': lambda config, rate: optax.sgd(rate),
}
SPARSE_VALUES = {
    'adam': lambda config, rate: lazy_adam(rate, config.beta1, config.beta2, config.epsilon),
    'sgd': lambda config, rate: sparse_sgd(rate),
    'rowwise_adam': lambda config, rate: rowwise_adam(rate, config.beta1, config.beta2,
                                                      config.epsilon),
    'rowwise_adagrad': lambda config, rate: rowwise_adagrad(rate, config.epsilon),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters change with their gradients.

    Raises:
      Refusal: a field is out of its range; the message names it.
    """
    optimizer: str = setting(
        'adam', "of the backbone: 'adam', 'lamb', 'adafactor' (its learning rate is relative to a "
        "parameter's root mean square) or 'muon' (of matrices; Adam of the rest)",
        choices=tuple(BACKBONE))
    learning_rate: float = setting(1e-4, 'of the backbone, after warmup', least=0.)
    values_learning_rate: float = setting(1e-3, 'of value tables, after warmup', least=0.)
    values_optimizer: str = setting(
        'adam', "of value tables: 'adam' or 'sgd'; with dense updates 'adam_bf16' too (moments in "
        "bfloat16, rounded stochastically), with sparse ones 'rowwise_adam' or 'rowwise_adagrad'",
        choices=tuple(dict.fromkeys((*DENSE_VALUES, *SPARSE_VALUES))))
    warmup: int = setting(10_000, 'steps of linear warmup; then linear decay to 0', least=0.)
    weight_decay: float = setting(0.01, 'times the learning rate; not of values, biases and norms',
                                  least=0.)
    beta1: float = setting(0.9, 'decay of the first moment', least=0., below=1.)
    beta2: float = setting(0.999, 'decay of the second moment', least=0., below=1.)
    epsilon: float = setting(1e-6, 'added to the root of the second moment', above=0.)
    values_epsilon: float = setting(
        1e-10, 'the same of value tables, whose gradients are far smaller (docs/method.md, 5); '
        '0: train.epsilon', least=0.)
    clip: float = setting(1.0, 'largest global norm of the gradient; 0: no clipping', least=0.)
    skip_loss_spikes: float = setting(
        0., 'skip steps whose loss is above this multiple of its running mean (of some 100 steps), '
        'as those that are not finite are; 0: none', least=0.)
    freeze: str = setting('nothing', "what stays as it is: 'nothing', the value 'tables', or the "
                          "'backbone', which is all but memories and the heads of a fine-tuned "
                          "model", choices=('nothing', 'tables', 'backbone'))

    def __post_init__(self) -> None:
        check_settings(self, 'train')


def make_optimizer(
    config: OptimizerConfig, steps: int, tables: Collection[str],
    is_backbone: Callable[[str], bool], sparse: bool = False,
) -> optax.GradientTransformation:
    """Clipping by global norm, then each group of parameters by its optimizer; updates need params.

    With `skip_loss_spikes` they need the `loss` too, see `skips.limit_loss`.

    Args:
      tables: the paths of the value tables, see `models.interface.table_paths`.
      is_backbone: of the path of a parameter, see `ModelConfig`.
      sparse: gradients of value tables come as SparseRows, to be applied by `sparse.apply_updates`.

    Raises:
      Refusal: config.values_optimizer is not one of `values_optimizers(sparse)`.
    """
    rate = schedule(config.learning_rate, config.warmup, steps)
    values_rate = schedule(config.values_learning_rate, config.warmup, steps)
    decayed, undecayed = BACKBONE[config.optimizer]
    frozen = {'nothing': None, 'tables': tables.__contains__, 'backbone': is_backbone}[
        config.freeze]
    groups = optax.partition({
        # Sparse optimizers need a table.
        'values': (_ZEROS if config.freeze == 'tables' else
                   _values_optimizer(config, values_rate, sparse)),
        'undecayed': undecayed(config, rate),
        'decayed': decayed(config, rate, config.weight_decay),
        'frozen': _ZEROS,
    }, lambda params: _labels(params, tables, frozen))
    # What is frozen counts for nothing in clipping either.
    before = [_zeroed_where(frozen)] if frozen else []
    if config.clip:
        before.append(clip_by_global_norm(config.clip))
    groups = optax.chain(*before, groups) if before else groups
    return limit_loss(groups, config.skip_loss_spikes) if config.skip_loss_spikes else groups


def _labels(params: Any, tables: Collection[str], frozen: Callable[[str], bool] | None) -> Any:
    """The group of each parameter, or 'frozen' where its path is."""
    return jax.tree_util.tree_map_with_path(
        lambda path, group: 'frozen' if frozen and frozen(path_of(path)) else group,
        groups_of(params, tables))


def _zeroed_where(chosen: Callable[[str], bool]) -> optax.GradientTransformation:
    """Zeros for the updates of the parameters whose paths are chosen."""
    def zero(path, leaf):
        if not chosen(path_of(path)):
            return leaf
        return (leaf._replace(rows=jnp.zeros_like(leaf.rows)) if is_rows(leaf) else
                jnp.zeros_like(leaf))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(
        zero, updates, is_leaf=is_rows))


_ZEROS = _zeroed_where(lambda path: True)


def values_optimizers(sparse: bool) -> tuple[str, ...]:
    """The names of the optimizers that a value table can have with dense or sparse updates."""
    return tuple(SPARSE_VALUES if sparse else DENSE_VALUES)


def values_state_bytes(config: OptimizerConfig, sparse: bool, width: int) -> float:
    """Bytes of optimizer state per number of a value table [S, `width`], counts left out.

    Raises:
      Refusal: config.values_optimizer is not one of `values_optimizers(sparse)`.
    """
    optimizer = _values_optimizer(config, config.values_learning_rate, sparse)

    def size(slots):
        state = jax.eval_shape(optimizer.init, jax.ShapeDtypeStruct((slots, width), jnp.float32))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    return (size(2048) - size(1024)) / (1024 * width)


def _values_optimizer(config, rate, sparse):
    names = values_optimizers(sparse)
    if config.values_optimizer not in names:
        kinds = ('sparse', 'dense') if sparse else ('dense', 'sparse')
        raise Refusal(f'train.values_optimizer = {config.values_optimizer!r} is none of {names}, '
                      f'which {kinds[0]} updates of value tables have: choose one of these, or set '
                      f'memory.updates = {kinds[1]!r}.')
    config = dataclasses.replace(config, epsilon=config.values_epsilon or config.epsilon)
    return (SPARSE_VALUES if sparse else DENSE_VALUES)[config.values_optimizer](config, rate)
