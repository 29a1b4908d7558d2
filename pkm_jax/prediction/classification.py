"""Classes of texts or pairs of texts, or a number for each."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pkm_jax.prediction.batches import Encoded, Shapes, TokenBatch, in_order
from pkm_jax.prediction.cutting import Tally, cut_as_in_training
from pkm_jax.prediction.texts import Fields, Text
from pkm_jax.prediction.trained import Trained
from pkm_jax.tasks.classification import TextClassification


class Classify:
    """Classes by the classifier of a BERT, as its task (`Trained.task`) names them."""

    def __init__(self, trained: Trained, task: TextClassification, fields: Fields):
        self._trained, self._task = trained, task
        self.tally, self.fields = Tally(task.length), fields
        self._program = jax.jit(functools.partial(_logits, trained.graph))

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """{'text', 'prediction', 'probabilities'} of each text; of a number no probabilities."""
        vocabulary = self._trained.vocabulary
        encode = functools.partial(cut_as_in_training, vocabulary, tally=self.tally)
        shapes = Shapes(rows, self._task.length)
        for text, logits in in_order(texts, encode, shapes, vocabulary.pad_id, self._run):
            yield {'text': text.text, **self._task.said(logits)}

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people: what is predicted, then the text."""
        said = result['prediction']
        if isinstance(said, float):
            return f'{said:8.3f}  {result["text"]}'
        names = [said] if isinstance(said, str) else said
        shares = ', '.join(f'{name} {result["probabilities"][name]:.1%}' for name in names)
        return f'{shares or "none"}  {result["text"]}'

    def _run(
        self, batch: TokenBatch, texts: Sequence[Encoded],
    ) -> Callable[[], Float[np.ndarray, 'B classes']]:
        logits = self._program(self._trained.state, batch)
        return lambda: np.asarray(logits, np.float64)[:len(texts)]


def _logits(
    graph: nnx.GraphDef, state: tuple[dict, dict], batch: TokenBatch,
) -> Float[Array, 'B classes']:
    model = nnx.merge(graph, *state)
    return model.class_logits(model(*batch)[0])
