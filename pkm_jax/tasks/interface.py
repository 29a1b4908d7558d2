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
    buckets: tuple[int, ...]    # lengths that batches are padded to, ascending, such as (length,)
    vocab_size: int     # words that a plan assumes where there is no vocabulary yet
    workers: int        # processes that make batches; 0: a thread of this one
    lower_is_better: tuple[str, ...]    # metrics of an evaluation of which less is better: errors

    @property
    def loss_name(self) -> LossName:
        """What the loss is called in reports."""

    def check(self, model: ModelConfig) -> None:
        """Refuses settings that cannot work with this model; the message names them."""

    def prepare(self, vocabulary: str, log: Callable[[str], None]) -> Data:
        """Returns the prepared data, from the cache where they are there. `vocabulary` is the path
        of that of the weights to start from, or ''."""

    def examples(self, data: Records, seed: int) -> Examples:
        """How records become examples; `seed` decides what is random in it, such as masks."""

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """The arrays of one example, by name."""

    def terms(self, batch: Batch) -> Float[Array, '']:
        """The number of terms of the batch's loss; the loss of a step is their mean."""

    def real(self, batch: Batch) -> Bool[Array, 'T']:
        """Which tokens are real and no padding, in the order in which memories read for them."""

    def outcome(
        self, model: nnx.Module, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """Runs the model over the batch, and sums its loss. `deltas` are those of memories that are
        updated sparsely, by their names (`ProductKeyMemory.read`)."""

    def metrics(self, sums: dict[str, Array]) -> dict[str, Array]:
        """The metrics of a step or an evaluation, computed from the sums 'loss', 'terms' and those
        of `outcome`. It must work for jax and for NumPy arrays."""

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Data, split: str,
    ) -> dict[str, float]:
        """The metrics of an evaluation over a split of the data. `outputs` are those of all its
        examples without padding, in the order of the batches."""

    def predictions(self) -> int:
        """Tokens of a sequence that are compared with the vocabulary (`ModelConfig`)."""
