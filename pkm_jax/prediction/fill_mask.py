"""The likeliest words in the place of each mask of a text."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from pkm_jax.models.bert import BertConfig
from pkm_jax.prediction.batches import Encoded, Shapes, TokenBatch, in_order
from pkm_jax.prediction.cutting import Cutter
from pkm_jax.prediction.texts import Fields, Text
from pkm_jax.prediction.trained import Trained
from pkm_jax.refusal import Refusal

MASKS = 4       # of a text in one program; where a batch has more, their next multiple


@dataclasses.dataclass(frozen=True)
class Masked(Encoded):
    """A text and the places of its masks."""
    masks: Sequence[int] = ()


class FillMask:
    """Words for masks, by the MLM head of a BERT.

    Raises:
      Refusal: the model has no such head, or not so many words.
    """

    def __init__(self, trained: Trained, top_k: int):
        words = len(trained.vocabulary.tokens)
        if not isinstance(trained.config, BertConfig) or 'mlm' not in trained.config.output_heads:
            raise Refusal(f'{trained.name} has no MLM head, which fills masks: name a run of '
                          f'masked-LM pretraining, or the folder of a BertForMaskedLM.')
        if not 1 <= top_k <= words:
            raise Refusal(f'--top_k={top_k} must lie within 1..{words:,}, the words of the '
                          f'vocabulary.')
        self._trained = trained
        self._cutter = Cutter(trained.vocabulary, trained.config.max_length)
        self.tally, self.fields = self._cutter.tally, Fields()
        self._program = jax.jit(functools.partial(_best_words, trained.graph, top_k, words))

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """{'text', 'masks': [[{'word', 'score'}, …], …]} of each text, the likeliest word first.

        Raises:
          Refusal: a text has no mask, or one beyond the tokens that the model takes.
        """
        vocabulary = self._trained.vocabulary
        shapes = Shapes(rows, self._trained.config.max_length)
        for text, best in in_order(texts, self._encode, shapes, vocabulary.pad_id, self._run):
            yield {'text': text.text, 'masks': [
                [{'word': vocabulary.tokens[word], 'score': float(score)}
                 for score, word in zip(*mask)] for mask in best]}

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people: the text, and below it the words of each mask."""
        lines = [result['text']]
        for number, mask in enumerate(result['masks'], 1):
            lines += [f'  mask {number}'] if len(result['masks']) > 1 else []
            lines += [f'  {entry["score"]:6.1%}  {entry["word"]}' for entry in mask]
        return '\n'.join(lines)

    def _encode(self, texts: Sequence[Text]) -> list[Masked]:
        return [self._masked(text) for text in texts]

    def _masked(self, text: Text) -> Masked:
        vocabulary = self._trained.vocabulary
        ids, beyond = self._cutter(text.content)
        masks = [place for place, token in enumerate(ids) if token == vocabulary.mask_id]
        name = vocabulary.special_tokens.mask
        if vocabulary.mask_id in beyond:
            raise Refusal(f'{text.where} has a {name} beyond the {self._trained.config.max_length} '
                          f'tokens that the model takes: shorten the text before it.')
        if not masks:
            raise Refusal(f'{text.where} has no {name} to fill: {text.content[:60]!r}.')
        return Masked(text.content, ids, masks=masks)

    def _run(self, batch: TokenBatch, texts: Sequence[Masked]) -> Callable[[], list]:
        most = max(len(text.masks) for text in texts)
        positions = np.zeros((len(batch.tokens), -(-most // MASKS) * MASKS), np.int32)
        for row, text in enumerate(texts):
            positions[row, :len(text.masks)] = text.masks
        scores, words = self._program(self._trained.state, batch, positions)
        return lambda: [list(zip(*best))[:len(text.masks)]
                        for *best, text in zip(np.asarray(scores), np.asarray(words), texts)]


def _best_words(
    graph: nnx.GraphDef, top_k: int, words: int, state: tuple[dict, dict], batch: TokenBatch,
    positions: Int[Array, 'B P'],
) -> tuple[Float[Array, 'B P k'], Int32[Array, 'B P k']]:
    """Probabilities and ids of the likeliest words at the positions, best first."""
    model = nnx.merge(graph, *state)
    states, _ = model(*batch)
    logits = model.mlm_logits(states, positions)[..., :words]
    scores, best = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    return scores, best
