"""What the memories of a model read for a stream of texts."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from pkm_jax.inspection.words import WordCutter, Words
from pkm_jax.models.bert import BertConfig
from pkm_jax.prediction.batches import Shapes, TokenBatch, in_order
from pkm_jax.prediction.texts import Text
from pkm_jax.prediction.trained import Trained
from pkm_jax.refusal import Refusal


class Reads(NamedTuple):
    """What one memory read for the T tokens of a text, best first."""
    slots: Int32[np.ndarray, 'T H K']
    weights: Float[np.ndarray, 'T H K']


def read_texts(
    trained: Trained, texts: Iterable[Text], cutter: WordCutter, rows: int,
) -> Iterator[tuple[Words, dict[int, Reads]]]:
    """Each text, with the reads of each memory by its layer.

    Raises:
      Refusal: the model has no memory.
    """
    if not trained.config.memories:
        raise Refusal(f'{trained.name} has no memory to look into: name a run with one.')
    segmented = isinstance(trained.config, BertConfig)
    program = jax.jit(functools.partial(_reads, trained.graph, segmented))

    def run(batch: TokenBatch, chosen: Sequence[Words]) -> Callable[[], list[dict[int, Reads]]]:
        found = program(trained.state, batch)
        return lambda: [
            {layer: Reads(*(part[row, :len(text.ids)] for part in map(np.asarray, reads)))
             for layer, reads in found.items()} for row, text in enumerate(chosen)]

    shapes = Shapes(rows, trained.config.max_length)
    return in_order(texts, cutter, shapes, trained.vocabulary.pad_id, run)


def _reads(
    graph: nnx.GraphDef, segmented: bool, state: tuple[dict, dict], batch: TokenBatch,
) -> dict[int, tuple[Int32[Array, 'B L H K'], Float[Array, 'B L H K']]]:
    model = nnx.merge(graph, *state)
    tokens, segments, lengths = batch
    _, reads = model(tokens, segments, lengths) if segmented else model(tokens, lengths)
    return {layer: tuple(part.reshape(*tokens.shape, *part.shape[1:])
                         for part in (read.slots, read.weights)) for layer, read in reads.items()}
