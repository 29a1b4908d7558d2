"""The product-key memory layer (docs/method.md, section 1): query, retrieval, weights, read."""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Key

from pkm_jax.dispatch import Implementation, check_implementation
from pkm_jax.fields import check_settings, setting
from pkm_jax.memory import sharded
from pkm_jax.memory.query_norm import QueryNorm
from pkm_jax.memory.sparse_rows import Touched
from pkm_jax.mesh import Axes, explicit_axes, mesh_in_use, on_auto_axes, shards_in_use
from pkm_jax.ops.dropout import HIGHEST_RATE, dropout, split_key
from pkm_jax.refusal import Refusal

Randomness = nnx.Rngs | nnx.RngStream | Key[Array, '']


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Sizes of one memory; the defaults are the paper's.

    docs/configuration.md explains each field, in its section `memory`.

    Raises:
      Refusal: a setting is out of its range; the message names it, its value and the remedy.
    """
    sub_keys: int = setting(512, 'N sub-keys in each codebook: N² slots', least=1)
    heads: int = setting(4, 'H heads, each with a query and codebooks of its own', least=1)
    top_k: int = setting(32, 'K slots that a token reads in each head', least=1)
    query_width: int = setting(512, 'Q, numbers in a query, each half of which searches one '
                               'codebook', least=2)
    value_width: int = setting(0, 'V, numbers in a value; 0: as many as the width of the model. '
                               'Else an output projection follows', least=0)
    query_norm: str = setting('batch', "of queries: 'layer' over each half, 'batch' over the real "
                              'tokens', choices=('none', 'layer', 'batch'))
    input_dropout: float = setting(0., 'rate, of the states that queries are made of', least=0,
                                   most=HIGHEST_RATE)
    query_dropout: float = setting(0., 'rate, of queries after their norm', least=0,
                                   most=HIGHEST_RATE)
    value_dropout: float = setting(0., 'rate, of the sum that was read', least=0,
                                   most=HIGHEST_RATE)
    values_dtype: str = setting('float32', "of the table; 'bfloat16' needs sparse updates",
                                choices=('float32', 'bfloat16'))
    weights_dtype: str = setting('float32', "of the reads' weights, also where devices exchange "
                                 'them', choices=('float32', 'bfloat16'))

    def __post_init__(self) -> None:
        check_settings(self, 'memory')
        if self.top_k > self.sub_keys:
            raise Refusal(f'memory.top_k = {self.top_k} must lie within 1..sub_keys, and '
                          f'memory.sub_keys is {self.sub_keys}.')
        if self.query_width % 2:
            raise Refusal(f'memory.query_width = {self.query_width} must be even: each half of a '
                          f'query searches one codebook.')

    @property
    def slots(self) -> int:
        return self.sub_keys ** 2

    @property
    def has_dropout(self) -> bool:
        return bool(self.input_dropout or self.query_dropout or self.value_dropout)


@jax.tree_util.register_static
class TableSlots(int):
    """S, of a table: a number that is known while a program is traced, as shapes are."""


class MemoryReads(NamedTuple):
    """What one call of a memory read; T is the product of all axes of its input but the last."""
    #: the slots that were read, in descending order of their scores
    slots: Int32[Array, 'T H K']
    #: their weights in float32; those of a token and head sum to 1, those of padding are 0
    weights: Float[Array, 'T H K']
    #: new running statistics of the query norm; {} where it has none
    batch_stats: dict
    #: the rows that `delta` stands for; None without a `delta`
    touched: Touched | None = None
    #: S, the number of slots of the table
    table_slots: TableSlots | None = None
    #: the queries after their norm, as they searched
    query: Float[Array, 'T H 2 half'] | None = None


class ProductKeyMemory(nnx.Module):
    """A memory of N² value rows that every token reads H·K of (Lample et al. 2019, section 3).

    A call maps states [..., D] to what they read, [..., D]. Where `deterministic` is False, it also
    updates the running statistics of the queries' batch norm. `read` computes the same, returns
    the slots too, and changes nothing.

    Args:
      config: the sizes of the memory.
      width: D, the width of the states.
      dtype: of the computation; parameters are float32, and the table `config.values_dtype`.
      values: the table of another memory of the same size, to share it; None makes a new one.
      axes: the axes of the mesh that split tokens and table; None: see `pkm_jax.mesh.axes_of`.
      implementation: which kernels run; None chooses, see `pkm_jax.dispatch.Choice`.
      rngs: the random numbers that parameters are drawn from.

    Raises:
      Refusal: there is no such `implementation`.
    """

    def __init__(
        self, config: MemoryConfig, width: int, *, dtype: DTypeLike = jnp.float32,
        values: nnx.Param | None = None, axes: Axes | None = None,
        implementation: Implementation | None = None, rngs: nnx.Rngs,
    ):
        check_implementation(implementation)
        self.config = config
        half = config.query_width // 2
        value_width = config.value_width or width
        self.query = nnx.Linear(width, config.heads * config.query_width, dtype=dtype,
                                kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
        if config.query_norm != 'none':
            self.query_norm = QueryNorm(config.query_norm, (config.heads, 2, half))
        bound = 1 / math.sqrt(half)
        self.codebooks = nnx.Param(jax.random.uniform(
            rngs.params(), (config.heads, 2, config.sub_keys, half), minval=-bound, maxval=bound))
        self.values = values if values is not None else nnx.Param(
            _normal_values(rngs.params(), (config.slots, value_width), config.values_dtype))
        self.output = (nnx.Linear(value_width, width, use_bias=False, dtype=dtype, rngs=rngs)
                       if value_width != width else None)
        self.dtype = dtype
        self.axes = axes
        self.implementation = implementation
        self.deterministic = False

    def __call__(
        self, x: Float[Array, '... D'], mask: Bool[Array, '...'] | None = None, *,
        deterministic: bool | None = None, rngs: Randomness | None = None,
    ) -> Float[Array, '... D']:
        """Returns what the tokens x read; updates the running statistics unless `deterministic`.

        See `read` for the arguments and errors. Under `jax.checkpoint`, where a module cannot
        change, call `read` inside and `update_batch_stats` outside.
        """
        y, reads = self.read(x, mask, deterministic=deterministic, rngs=rngs)
        self.update_batch_stats(reads.batch_stats)
        return y

    def read(
        self, x: Float[Array, '... D'], mask: Bool[Array, '...'] | None = None, *,
        deterministic: bool | None = None, rngs: Randomness | None = None,
        delta: Float[Array, 'rows V'] | None = None,
    ) -> tuple[Float[Array, '... D'], MemoryReads]:
        """Returns what the tokens x read, and which slots; changes nothing.

        Args:
          x: the states of the tokens.
          mask: which tokens are real (None: all). Padding reads nothing and is in no statistic.
          deterministic: True: no dropout, and the running statistics; False: dropout, and the
            statistics of this batch; None: the attribute of that name, which is False until
            `eval()` is called.
          rngs: random numbers of the dropout; needed only where a rate is above 0.
          delta: for sparse updates, the zeros of `no_delta`. Then the table is a constant of the
            derivative, and the gradient of `delta` is that of the rows `reads.touched`.

        Raises:
          Refusal: states of another width, a mask of another shape, dropout without `rngs`, a
            mesh that lacks an axis, does not divide or has XLA split a kernel, or an
            implementation that cannot take these arrays.
        """
        config = self.config
        deterministic = self.deterministic if deterministic is None else deterministic
        width = self.query.in_features
        if x.shape[-1:] != (width,):
            raise Refusal(f'A memory of width {width} cannot read for states {x.shape}, of width '
                          f'{x.shape[-1]}: build it with that width.')
        if mask is not None and mask.shape != x.shape[:-1]:
            raise Refusal(f'mask {mask.shape} of tokens {x.shape[:-1]}: it must have one element '
                          f'for each.')
        mask = jnp.ones(x.shape[:-1], bool) if mask is None else mask
        key = None if deterministic or not config.has_dropout else _key_of(rngs)
        axes, implementation = self._resolved(mask.size)
        mesh = mesh_in_use()
        typed = mesh is not None and AxisType.Explicit in mesh.axis_types
        run = self._read_typed if typed else self._read
        return run(x, mask, key, delta, deterministic=deterministic, axes=axes,
                   implementation=implementation)

    def _resolved(self, tokens):
        """Axes and implementation in the mesh in use."""
        axes, implementation = sharded.resolve(self.axes, self.implementation)
        shards = shards_in_use(axes)
        slots, width = self.values.shape
        for what, size, parts in (('tokens', tokens, math.prod(shards)),
                                  ('slots', slots, shards.rows),
                                  ('numbers in a value', width, shards.columns)):
            if size % parts:
                raise Refusal(f'{size} {what} do not divide into {parts} parts, which '
                              f'{axes} asks for in the mesh in use.')
        return axes, implementation if tokens else 'xla'     # a kernel's grid cannot be empty

    def _read_typed(self, x, mask, key, delta, *, axes, **settings):
        """`_read` in a mesh with Explicit axes, which within it are Auto."""
        graph, state = nnx.split(self)
        given = explicit_axes(axes)
        *leading, _ = jax.typeof(x).sharding.spec
        tokens = given.tokens if axes.names else P(None if any(leading[1:]) else leading[0])
        rows: Any = P(given.table[0])   # specs in the places of arrays
        split, whole = cast(Any, tokens), cast(Any, P())
        specs = (jax.typeof(x).sharding.spec, MemoryReads(
            split, split, whole, None if delta is None else Touched(rows, rows),
            TableSlots(len(self.values)), split))

        def run(state, *arrays):
            return nnx.merge(graph, state)._read(*arrays, axes=axes, **settings)

        return on_auto_axes(run, specs)(state, x, mask, key, delta)

    def _read(self, x, mask, key, delta, *, deterministic, axes, implementation):
        config, shape = self.config, x.shape
        keys = split_key(key, 3)
        x, mask = x.reshape(-1, shape[-1]), mask.reshape(-1)

        x = dropout(x, config.input_dropout, keys[0])
        query = rearrange(self.query(x), 't (h two half) -> t h two half', h=config.heads, two=2)
        batch_stats = {}
        if config.query_norm != 'none':     # without tokens there are no batch statistics
            query, batch_stats = self.query_norm(query, mask, not deterministic and len(x) > 0)
        query = dropout(query, config.query_dropout, keys[1])

        with jax.named_scope('retrieval'):
            scores, slots = sharded.top_k_product_keys(
                query, self.codebooks[...].astype(self.dtype), config.top_k, axes=axes,
                implementation=implementation)
        weights = jnp.where(mask[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
        values, table_weights = self.values[...], weights.astype(config.weights_dtype)
        flat = -1, config.heads * config.top_k
        reads = slots.reshape(flat), table_weights.reshape(flat)
        settings = dict(axes=axes, implementation=implementation)
        with jax.named_scope('read'):
            if delta is not None:
                y, touched = sharded.sparse_embedding_bag(values, delta, *reads, **settings)
            else:
                # A step with dense updates reads about every row: to round all of them once takes
                # less than to read them wider twice. An evaluation has no second read, nor memory
                # to spare.
                dtype = values.dtype if deterministic else self.dtype
                y, touched = sharded.embedding_bag(values, *reads, dtype, **settings), None
        y = dropout(y, config.value_dropout, keys[2]).astype(self.dtype)
        y = self.output(y) if self.output else y
        return y.reshape(shape), MemoryReads(slots, weights, batch_stats, touched,
                                             TableSlots(len(values)), query)

    def update_batch_stats(self, batch_stats: dict[str, Array]) -> None:
        """Sets the running statistics to `batch_stats`, which a `read` returned."""
        for name, array in batch_stats.items():
            getattr(self.query_norm, name)[...] = array

    def no_delta(self, tokens: int) -> Float[Array, 'rows V']:
        """The zeros that `read` takes as `delta`, for so many tokens, padding included.

        Raises:
          Refusal: the mesh in use lacks one of the axes.
        """
        reads = tokens * self.config.heads * self.config.top_k
        slots, width = self.values.shape
        return sharded.no_delta(slots, width, reads, axes=self.axes)


def _key_of(rngs):
    """A key for dropout, taken as `nnx.Dropout` does."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout()
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    if rngs is None:
        raise Refusal('A memory with dropout needs rngs (nnx.Rngs or a key) where it is not '
                      'deterministic.')
    return rngs


def _normal_values(key, shape, dtype):
    return (jax.random.normal(key, shape) / math.sqrt(shape[1])).astype(dtype)
