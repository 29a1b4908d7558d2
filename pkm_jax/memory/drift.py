"""Outdated slots: how far what decides who reads a slot has moved since its value was last updated,
and what a loss falls by when values are refreshed (docs/method.md, section 4).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

OUTDATED = 0.5      # drift above which a slot counts as outdated
SIMPSON = {0.: 1 / 6, .5: 4 / 6, 1.: 1 / 6}     # weights of places along a change of all values


def sub_key_scores(
    query: Float[Array, 'T H 2 half'], codebooks: Float[Array, 'H 2 N half'],
) -> Float[Array, 'T H 2 N']:
    """Float32 scores of the sub-keys for some tokens: slot i·N + j scores [0, i] + [1, j]."""
    return jnp.einsum('thpd,hpnd->thpn', query, codebooks.astype(query.dtype),
                      preferred_element_type=jnp.float32)


@jax.jit
def slot_drift(
    now: Float[Array, 'T H 2 N'], then: Float[Array, 'T H 2 N'],
) -> Float[Array, 'S']:
    """Drift of each of N² slots between two `sub_key_scores` of the same tokens, within [0, 2].

    1 − the correlation, over tokens and heads, of the scores that the slot had then and has now. A
    score counts as its difference from the mean of its token over all slots, which changes no
    weight, and from the mean of its slot over the tokens, in each head. What turns queries and keys
    alike, or scales all scores, is no drift. 0 where a slot's scores tell no token from another.
    """
    now, then = _centred(now), _centred(then)
    scale = jnp.sqrt(_products(now, now) * _products(then, then))
    return jnp.where(scale > 0, 1 - _products(now, then) / jnp.where(scale > 0, scale, 1), 0)


def drift_of_slots(
    snapshots: Sequence[tuple[int, Float[np.ndarray, 'T H 2 N']]],
    last_selected: Int32[np.ndarray, 'S'],
) -> Float[np.ndarray, 'S']:
    """Drift of each slot since its value was last updated, to the last of some snapshots.

    snapshots: steps taken, ascending, and `sub_key_scores` after them. last_selected: the step
    (counted from 0) that last read each slot, see `usage.mark_selected`. A slot is compared with
    the first snapshot since; one never read, with the first of all; one read since the last but
    one, with the last itself: its drift is 0.
    """
    steps, (_, now) = np.array([step for step, _ in snapshots]), snapshots[-1]
    since = np.minimum(np.searchsorted(steps, last_selected, side='right'), len(steps) - 1)
    drift = np.zeros(len(last_selected), np.float32)
    for index in np.unique(since[since < len(steps) - 1]):
        of_then = np.asarray(slot_drift(*map(jnp.asarray, (now, snapshots[index][1]))))
        drift[since == index] = of_then[since == index]
    return drift


def fall_by_slot(gradient: Float[Array, 'S V'], change: Float[Array, 'S V']) -> Float[Array, 'S']:
    """What the change Δ of each slot's value takes off a loss of this gradient: −g·Δ.

    Averaged with the weights of SIMPSON over the gradients at the values before, half-way through
    and after the change of all of them, it adds up over the slots to the fall of the loss, exactly
    where that is of up to the fourth degree along the change.
    """
    return -jnp.sum(gradient * change, axis=1)


def _centred(scores):
    scores -= scores.mean(axis=-1, keepdims=True)
    return scores - scores.mean(axis=0, keepdims=True)


def _products(a, b):
    """Σ over tokens and heads of (a₁[i] + a₂[j])·(b₁[i] + b₂[j]), of slot i·N + j."""
    def paired(p, q):
        return jnp.einsum('thi,thj->ij', a[:, :, p], b[:, :, q], precision='highest')

    own = [jnp.sum(a[:, :, p] * b[:, :, p], axis=(0, 1)) for p in (0, 1)]
    mixed = paired(0, 1) + paired(1, 0).T
    return (own[0][:, None] + own[1][None] + mixed).reshape(-1)
