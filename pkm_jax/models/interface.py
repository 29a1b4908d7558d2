"""What training and planning know of a model: how it is built, where its memories are, its costs.

A model is described by a frozen dataclass that has what `ModelConfig` says, such as `BertConfig`.
What the module it builds takes and returns is between the module and its task (tasks/interface.py).
"""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from pkm_jax.memory.layer import MemoryConfig

Path = tuple[str | int, ...]    # of a node in the nested dict of parameters


class MemorySite(NamedTuple):
    """A memory of a model. Where several memories share a value table, `table` is the same path."""
    config: MemoryConfig
    path: Path          # of the memory among the parameters
    table: Path         # of its value table
    value_width: int    # V
    title: str          # what a person reads: 'layer 4'


class Saving(NamedTuple):
    """A field of a model, and its value with which a step keeps less memory."""
    field: str
    value: Any
    same_results: bool


@runtime_checkable
class ModelConfig(Protocol):
    """Sizes of a model, as a frozen dataclass."""

    @property
    def vocab_size(self) -> int:
        """Rows of the word embedding; 0 where the vocabulary is not known yet."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def dtype(self) -> str:
        """The dtype of the computation: 'float32' or 'bfloat16'."""

    @property
    def word_embedding(self) -> Path:
        """The path of the word embedding among the parameters; () where there is none."""

    def with_vocabulary(self, words: int) -> Any:
        """The same sizes, with `vocab_size` set to that many words where it is 0."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with fresh parameters."""

    @property
    def memories(self) -> dict[Any, MemorySite]:
        """The memories by name. Their reads, deltas and marks have these names, in reports too."""

    def is_backbone(self, path: str) -> bool:
        """Whether the parameter at a path such as 'layers/0/attention/query/kernel' belongs to the
        pretrained network: to no memory, and to no head that fine-tuning adds."""

    def unseen(self) -> dict[str, Any]:
        """Settings that matter for trained weights and that cannot be told from their shapes."""

    def fast_paths(self, platform: str) -> list[str]:
        """Lines for the log: what makes a step fast or slow on 'cpu', 'gpu' or 'tpu', and why."""

    def savings(self) -> list[Saving]:
        """Settings with which a step would need less device memory."""

    def forward_flops(self, length: int, predictions: int) -> int:
        """Floating-point operations of the matrix products of one sequence's forward pass, of
        which `predictions` tokens reach the vocabulary."""

    def activation_bytes(self, sequences: int, length: int, predictions: int) -> int:
        """An estimate of the bytes that a device keeps from the forward to the backward pass."""


class TracedRngs(nnx.Rngs):
    """`nnx.Rngs(key)` for a model that is built while it is traced: the same keys, sooner.

    Flax counts them in an array and asks it for its sharding. A traced array has none, and JAX
    composes the text of that error from all operations so far. Its streams are only to be called.
    """

    def __init__(self, key: Key[Array, '']) -> None:
        self.default = _Counted(key)    # for every name


class _Counted:
    def __init__(self, key: Key[Array, '']) -> None:
        self.key, self.count = key, 0

    def __call__(self) -> Key[Array, '']:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def abstract_model(config: ModelConfig) -> nnx.Module:
    """The module with shapes in the place of its parameters and statistics."""
    return nnx.eval_shape(lambda: config.build(TracedRngs(jax.random.key(0))))


def table_paths(memories: dict[Any, MemorySite]) -> frozenset[str]:
    """Where the value tables of a model's memories are: {'layers/0/memory/values'}."""
    return frozenset('/'.join(map(str, site.table)) for site in memories.values())


def path_of(keys: tuple) -> str:
    """'layers/0/attention/query/kernel' of the keys that lead to a leaf of a tree."""
    return jax.tree_util.keystr(keys, simple=True, separator='/')


def parameter_of(path: str, parameters: Collection[str]) -> str:
    """The parameter that an array of an optimizer's state belongs to, whose path ends its `path`;
    '' of a count."""
    parts = path.split('/')
    ends = ('/'.join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in parameters), '')


def at(tree: dict, path: Path) -> Any:
    """The node of a nested dict at a path."""
    for part in path:
        tree = tree[part]
    return tree


def replaced(tree: dict, path: Path, node: Any) -> dict:
    """`tree` with another node at a path; nothing of the tree is changed."""
    first, *rest = path
    return {**tree, first: replaced(tree[first], tuple(rest), node) if rest else node}


def flatten(tree: dict) -> dict[str, Any]:
    """{'layers': {0: {'memory': x}}} -> {'layers/0/memory': x}."""
    return {'/'.join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`: numbers in a path become the keys of layers again."""
    return unflatten_dict({
        tuple(int(part) if part.isdigit() else part for part in path.split('/')): leaf
        for path, leaf in flat.items()})
