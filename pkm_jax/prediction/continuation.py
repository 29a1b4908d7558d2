"""Prompts continued by a causal model: one program reads them, another writes token by token."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from pkm_jax.models.causal import CausalConfig, Past
from pkm_jax.prediction.batches import Encoded, Shapes, TokenBatch, in_order
from pkm_jax.prediction.cutting import Cutter
from pkm_jax.prediction.texts import Fields, Text
from pkm_jax.prediction.trained import Trained
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Raises:
      Refusal: a setting is out of its range.
    """
    temperature: float = 1.     # logits are divided by it; 0: always the likeliest token
    top_p: float = 1.           # of the likeliest tokens that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float('inf'):
            raise Refusal(f'--temperature={self.temperature} must be 0 (the likeliest token) or '
                          f'more.')
        if not 0 < self.top_p <= 1:
            raise Refusal(f'--top_p={self.top_p} must lie above 0 and be at most 1.')
        if not 0 <= self.seed < 2 ** 32:
            raise Refusal(f'--seed={self.seed} must lie within 0..{2 ** 32 - 1}.')


@dataclasses.dataclass(frozen=True)
class Prompt(Encoded):
    """A text and how many were before it."""
    number: int = 0


class Continue:
    """Continues prompts up to the end of their paragraph, or by `most` tokens.

    The draws of a prompt depend on the seed, on how many prompts were before it and on nothing
    else: not on those that are computed with it.

    Raises:
      Refusal: the model is not causal, or has no room for so many tokens.
    """

    def __init__(self, trained: Trained, sampling: Sampling, most: int):
        config = trained.config
        if not isinstance(config, CausalConfig):
            raise Refusal(f'{trained.name} is no causal model: it cannot continue a text.')
        if not 1 <= most < config.max_length:
            raise Refusal(f'--max_new={most} must lie within 1..{config.max_length - 1}: the model '
                          f'takes {config.max_length} tokens, the prompt among them.')
        self._trained, self._most, self._seed = trained, most, sampling.seed
        self._cutter = Cutter(trained.vocabulary, config.max_length - most, prompt=True)
        self.tally, self.fields, self._count = self._cutter.tally, Fields(), 0
        vocabulary = trained.vocabulary
        allowed = np.zeros(config.vocab_size, bool)
        allowed[vocabulary.ordinary_ids] = allowed[vocabulary.sep_id] = True
        self._read = jax.jit(functools.partial(read_prompts, trained.graph))
        self._write = jax.jit(functools.partial(
            write, trained.graph, sampling, allowed, vocabulary.sep_id))

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """{'text', 'continuation', 'ended'} of each prompt; ended: where its paragraph did."""
        vocabulary = self._trained.vocabulary
        decode = vocabulary.tokenizer().decode
        shapes = Shapes(rows, self._trained.config.max_length)
        for text, new in in_order(texts, self._encode, shapes, vocabulary.pad_id, self._run):
            ended = vocabulary.sep_id in new
            new = new[:new.index(vocabulary.sep_id)] if ended else new
            before = decode(text.ids)
            after = decode([*text.ids, *new])
            yield {'text': text.text, 'continuation': after[len(before):], 'ended': ended}

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people: the text and how it goes on."""
        return f'{result["text"]} …{result["continuation"]}{"" if result["ended"] else " …"}'

    def _encode(self, texts: Sequence[Text]) -> list[Prompt]:
        first = self._count
        self._count += len(texts)
        return [Prompt(text.content, self._cutter(text.content)[0], number=number)
                for number, text in enumerate(texts, first)]

    def _run(self, batch: TokenBatch, texts: Sequence[Prompt]) -> Callable[[], list[list[int]]]:
        numbers = np.zeros(len(batch.tokens), np.uint32)
        numbers[:len(texts)] = [text.number for text in texts]
        used = np.arange(len(numbers)) < len(texts)
        state = self._trained.state
        logits, past = self._read(state, batch.tokens, batch.lengths)
        written = self._write(state, logits, past, batch.lengths, used,
                              np.uint32(self._seed), numbers, self._most)
        return lambda: np.asarray(written)[:len(texts), :self._most].tolist()


def read_prompts(
    graph: nnx.GraphDef, state: tuple[dict, dict], tokens: Int[Array, 'B L'],
    lengths: Int[Array, 'B'],
) -> tuple[Float[Array, 'B vocab'], list[Past]]:
    """Logits of the token after each prompt, and the cache that holds the prompts."""
    model = nnx.merge(graph, *state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states, past = model.extend(tokens, positions, model.empty_past(len(tokens)))
    last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)
    return model.logits(last)[:, 0], past


def write(
    graph: nnx.GraphDef, sampling: Sampling, allowed: Bool[np.ndarray, 'vocab'], end: int,
    state: tuple[dict, dict], logits: Float[Array, 'B vocab'], past: list[Past],
    lengths: Int[Array, 'B'], used: Bool[Array, 'B'], seed: Array, numbers: Array, most: Array,
) -> Int32[Array, 'B M']:
    """The first `most` tokens after each prompt; those after an `end` mean nothing.

    It stops where all rows that are `used` have ended. numbers [B]: of the prompts, for the draws.
    """
    model = nnx.merge(graph, *state)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)

    def step(carry):
        place, logits, past, written, going = carry
        logits = jnp.where(allowed[None], logits, -jnp.inf)
        token = jax.vmap(functools.partial(draw, sampling))(
            logits, jax.vmap(lambda key: jax.random.fold_in(key, place))(keys))
        states, past = model.extend(token[:, None], (lengths + place)[:, None], past)
        written = written.at[:, place].set(token)
        return place + 1, model.logits(states)[:, 0], past, written, going & (token != end)

    def goes_on(carry):
        place, *_, going = carry
        return (place < most) & going.any()

    written = jnp.full((len(lengths), model.config.max_length), end, jnp.int32)
    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), logits, past, written, used))[3]


def draw(
    sampling: Sampling, logits: Float[Array, 'vocab'], key: Key[Array, ''],
) -> Int32[Array, '']:
    """A token: of the likeliest ones that together reach the probability `top_p` (Holtzman et al.
    2020), at the given temperature."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    logits = logits / sampling.temperature
    falling = jnp.sort(logits, descending=True)
    shares = jax.nn.softmax(falling)
    least = jnp.min(jnp.where(jnp.cumsum(shares) - shares < sampling.top_p, falling, jnp.inf))
    kept = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, kept).astype(jnp.int32)
