"""From a record of tokens to an example of a batch: what a task learns from it.

An example is a dict of NumPy arrays; a batch stacks those of its rows. `arrays` says once what is
in them: the loader makes batches by it, planning compiles for it, tasks and tests read it.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from pkm_jax.data.masking import Masking

Example = dict[str, Any]


class ArraySpec(NamedTuple):
    """An array of an example, which may be shorter along its first axis: it is filled up.

    `by_token`: that axis is the tokens', and as short as the batch may be.
    """
    shape: tuple[int, ...]
    dtype: type
    fill: int = 0
    by_token: bool = False

    def cut(self, length: int) -> 'ArraySpec':
        """The same in a batch of shorter sequences."""
        return self._replace(shape=(length, *self.shape[1:])) if self.by_token else self


@runtime_checkable
class Examples(Protocol):
    """How a record becomes an example. Cheap to pickle, and the same in any process."""

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays of an example; a row of a batch without a record has `fill` alone."""

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a stream of batches to go on where it was left; for JSON."""

    def __call__(self, record: dict, epoch: int, number: int) -> Example:
        """The example of record `number` in an epoch."""


def token_arrays(length: int, pad: int = 0) -> dict[str, ArraySpec]:
    """Tokens of one text, and how many of them are real."""
    return {'tokens': ArraySpec((length,), np.int32, pad, by_token=True),
            'lengths': ArraySpec((), np.int32)}


def masked_arrays(length: int, predictions: int, pad: int = 0) -> dict[str, ArraySpec]:
    """Tokens with masks among them, and what is to be predicted: mlm_weights are 1 there."""
    return {**token_arrays(length, pad), 'segments': ArraySpec((length,), np.int32, by_token=True),
            'mlm_positions': ArraySpec((predictions,), np.int32),
            'mlm_labels': ArraySpec((predictions,), np.int32),
            'mlm_weights': ArraySpec((predictions,), np.float32)}


@dataclasses.dataclass(frozen=True)
class MaskedExamples:
    """Masked anew in every epoch (Devlin et al. 2019, section 3.1)."""
    masking: Masking

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        masking = self.masking
        return masked_arrays(masking.length, masking.slots, masking.vocabulary.pad_id)

    @property
    def identity(self) -> dict[str, Any]:
        return {'mask_rate': self.masking.rate, 'whole_word': self.masking.whole_word,
                'max_predictions': self.masking.slots}

    def __call__(self, record: dict, epoch: int, number: int) -> Example:
        tokens, positions, labels = self.masking(record['tokens'], epoch, number)
        return {'tokens': tokens, 'lengths': len(tokens), 'mlm_positions': positions,
                'mlm_labels': labels, 'mlm_weights': np.ones(len(positions), np.float32)}


@dataclasses.dataclass(frozen=True)
class TextExamples:
    """The record as it is, each of whose tokens is to be predicted from those before it."""
    length: int
    pad: int = 0

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        return token_arrays(self.length, self.pad)

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def __call__(self, record: dict, epoch: int, number: int) -> Example:
        tokens: Int32[np.ndarray, length] = record['tokens']
        return {'tokens': tokens, 'lengths': len(tokens)}
