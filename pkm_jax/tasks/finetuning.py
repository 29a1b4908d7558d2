"""What all tasks with labels have in common: their files, their batches, what a head reads."""

import abc
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pkm_jax.data import tokenizer
from pkm_jax.data.examples import ArraySpec
from pkm_jax.data.files import expand
from pkm_jax.data.labelled import Labelled, LabelledExamples, buckets_of, labelled_arrays
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.fields import check_settings, setting
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import ModelConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.interface import Batch, Task
from pkm_jax.tasks.text import real_tokens


@runtime_checkable
class FinetuningTask(Task, Protocol):
    """A task with labels, for `pkm_jax.finetune`."""
    length: int

    @property
    def metric(self) -> str:
        """By which the best weights are chosen."""

    def of_data(self, data: Labelled) -> 'FinetuningTask':
        """The same with what only the data say, such as label names."""

    def head(self, model: BertConfig) -> BertConfig:
        """The model with the head that the task reads, and no other."""

    def score(self, values: dict[str, dict[str, Any]]) -> float:
        """What counts of the evaluations of the splits, in one number."""

    def baseline(self, data: Labelled, split: str) -> dict[str, float]:
        """What one reaches who learns nothing."""

    def rows(self, data: Labelled, split: str, outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A line for each prediction, in the order of the data."""

    def write(
        self, folder: Path, data: Labelled, split: str, outputs: dict[str, Any],
    ) -> list[Path]:
        """Files in the form that others score or submit, beside those lines."""


@dataclasses.dataclass(frozen=True)
class Labelling(abc.ABC):
    """Files with labels, as sequences of at most `length` tokens.

    Raises:
      Refusal: a value is out of its range.
    """
    vocab: str = setting('', "vocab.txt, tokenizer.json or their folder; '': that of init_from")
    length: int = setting(128, 'L, tokens of the longest sequence', least=8)
    buckets: tuple[int, ...] = setting(
        (), 'lengths that batches are padded to, ascending; (): the four that pad least')
    workers = 0             # data are in memory: a thread makes batches
    vocab_size = 30_522     # of a plan
    head_name = ''          # of the model's heads the one that is read
    metric = ''             # by which the best weights are chosen
    lower_is_better: ClassVar[tuple[str, ...]] = ('loss', 'rmse')

    def __post_init__(self) -> None:
        check_settings(self, 'data')
        if self.buckets and (list(self.buckets) != sorted(set(self.buckets))
                             or self.buckets[-1] > self.length):
            raise Refusal(f'data.buckets = {self.buckets} must ascend, up to data.length = '
                          f'{self.length} at most.')

    def check(self, model: ModelConfig) -> None:
        """Refuses a model without the head, or of shorter sequences.

        Raises:
          Refusal: it has none.
        """
        if not isinstance(model, BertConfig) or self.head_name not in model.output_heads:
            raise Refusal(f'{type(self).__name__} needs a BERT with the head {self.head_name!r}, '
                          f'not {model}.')
        if self.length > model.max_length:
            raise Refusal(f'data.length = {self.length} exceeds the {model.max_length} positions '
                          f'of the model: shorten it.')

    def vocabulary(self, found: str) -> Vocabulary:
        """The vocabulary of the texts; `found` is that of the weights to start from.

        Raises:
          Refusal: there is none.
        """
        return tokenizer.load(self.vocab or found)

    def with_buckets(self, data: Labelled) -> Any:
        """The same with buckets: those that are set and some example falls into, else chosen."""
        lengths = np.concatenate([data.lengths(split) for split in data.splits])
        if self.buckets and lengths.max() > self.buckets[-1]:
            raise Refusal(f'data.buckets = {self.buckets}, but a sequence has {lengths.max()} '
                          f'tokens: end with {lengths.max()} or more, or with data.length.')
        buckets = np.array(self.buckets or buckets_of(lengths, self.length))
        found = np.unique(buckets[np.searchsorted(buckets, lengths)])
        return dataclasses.replace(self, buckets=tuple(map(int, found)))

    def examples(self, data: Labelled, seed: int) -> LabelledExamples:
        """The records as they are: nothing in them is random."""
        pad = tokenizer.load(data.vocab_path).pad_id
        return LabelledExamples(labelled_arrays(self.length, self.targets, pad))

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        return labelled_arrays(self.length, self.targets)

    @property
    @abc.abstractmethod
    def targets(self) -> dict[str, ArraySpec]:
        """The arrays of an example that hold what is to be predicted."""

    def terms(self, batch: Batch) -> Float[Array, '']:
        """Examples."""
        return jnp.sum(batch['weights'])

    def real(self, batch: Batch) -> Bool[Array, 'T']:
        """Tokens within the lengths of their rows."""
        return real_tokens(batch)

    def metrics(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Mean loss."""
        return {'loss': sums['loss'] / sums['terms']}

    def score(self, values: dict[str, dict[str, Any]]) -> float:
        """The metric of the validation data."""
        return values['validation'][self.metric]

    def baseline(self, data: Labelled, split: str) -> dict[str, float]:
        """Nothing to compare with."""
        return {}

    def write(
        self, folder: Path, data: Labelled, split: str, outputs: dict[str, Any],
    ) -> list[Path]:
        """Nothing beside the lines."""
        return []

    def predictions(self) -> int:
        """No token is compared with the vocabulary."""
        return 0


def in_order(outputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs of all examples in the order of the data, each exactly once."""
    numbers = outputs['example']
    order: Int[np.ndarray, n] = np.argsort(numbers, kind='stable')
    if not np.array_equal(numbers[order], np.arange(len(numbers))):
        raise AssertionError(f'{len(numbers)} outputs of {len(set(numbers.tolist()))} examples')
    return {name: array[order] for name, array in outputs.items()}


def file_of(path: str, field: str) -> str:
    """The path that a field names.

    Raises:
      Refusal: it is empty, or no such file is there.
    """
    if not path:
        raise Refusal(f"data.{field} = '': name a file.")
    if not Path(expand(path)).is_file():
        raise Refusal(f'data.{field} = {path!r}: there is no such file.')
    return expand(path)
