"""What training, evaluation and planning know of a task: its batches, its loss, its metrics.

A task is a frozen dataclass that has what `Task` says; its fields are the section `data` of a
configuration. It knows what the module of its model takes and returns, which training does not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from pkm_jax.data.examples import ArraySpec, Examples
from pkm_jax.data.loader import Records
from pkm_jax.memory.layer import MemoryReads
from pkm_jax.models.interface import ModelConfig

Batch = dict[str, Array]


class Outcome(NamedTuple):
    """What a model made of a batch."""
    loss: Float[Array, '']              # summed over the terms that `Task.terms` counts
    sums: dict[str, Array]              # further sums over them
    reads: dict[Any, MemoryReads]       # what each memory read
    outputs: dict[str, Array]           # by example, for metrics of an evaluation that are no sums


class LossName(NamedTuple):
    """What a task's loss is called where a person reads of it."""
    name: str       # 'Masked-LM loss'
    unit: str       # 'nats', or ''
    meaning: str    # 'mean cross-entropy of the masked tokens'


@runtime_checkable
class Data(Protocol):
    """Prepared records, and the vocabulary of their tokens."""
    fingerprint: str
    vocab_size: int
    vocab_path: str     # of its tokenizer, which runs keep a copy of; '' where there is none

    def num_records(self, split: str) -> int: ...

    def records(self, split: str) -> Sequence: ...


@runtime_checkable
class Task(Protocol):
    """What is learnt, and from what."""
    length: int         # tokens of an example
    buckets: tuple[int, ...]    # that batches are padded to, ascending; `length` alone: no others
    vocab_size: int     # words of a vocabulary that is not there yet, as plans assume
    workers: int        # processes that make batches; 0: threads of this one
    lower_is_better: tuple[str, ...]    # of the metrics of an evaluation: those of errors

    @property
    def loss_name(self) -> LossName:
        """Of its loss."""

    def check(self, model: ModelConfig) -> None:
        """Refuses what cannot work with this model, by name."""

    def prepare(self, vocabulary: str, log: Callable[[str], None]) -> Data:
        """The data, from a cache if they are there. `vocabulary` is that of the weights to start
        from, or ''."""

    def examples(self, data: Records, seed: int) -> Examples:
        """How records become examples; `seed` is of what is random in that."""

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """Those of an example."""

    def terms(self, batch: Batch) -> Float[Array, '']:
        """The number of terms of the batch's loss, which is their mean."""

    def real(self, batch: Batch) -> Bool[Array, 'T']:
        """Which of the tokens that memories read for are no padding."""

    def outcome(
        self, model: nnx.Module, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """Sums over the batch. `deltas` stand for the value rows that a sparse update changes."""

    def metrics(self, sums: dict[str, Array]) -> dict[str, Array]:
        """What one reads of a step or an evaluation, from the sums 'loss', 'terms' and those of
        `outcome`; for jax and NumPy arrays alike."""

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Data, split: str,
    ) -> dict[str, float]:
        """Metrics of an evaluation over a split of the data, of which `outputs` are those of all
        real examples, in the order of the batches."""

    def predictions(self) -> int:
        """Tokens of a sequence that are compared with the vocabulary (`ModelConfig`)."""
