"""Text to learn from without labels: where it is, and how it is cut into records."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool

from pkm_jax.data import dataset
from pkm_jax.data.dataset import Prepared
from pkm_jax.fields import check_settings, setting
from pkm_jax.models.interface import ModelConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.interface import Batch, Data


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """A corpus, prepared once: tokenised and packed into records of `length` tokens.

    Raises:
      Refusal: a value is out of its range.
    """
    corpus: str = setting('', "globs of .txt or .jsonl files (with ',' between), a prepared "
                              "folder, 'tfds:NAME' or 'state-of-the-union'")
    vocab: str = setting('', "vocab.txt, tokenizer.json or their folder; '': that of init_from, "
                             'else trained on the corpus')
    vocab_size: int = setting(30_522, 'words of a trained vocabulary', least=1)
    lowercase: bool | None = setting(
        None, 'lower-case text; None: of a trained vocabulary yes, else what the tokenizer says')
    strip_accents: bool | None = setting(
        None, 'strip accents from text; None: of a trained vocabulary no, else what it says')
    encoding: str = setting('utf-8', 'of text files without a byte order mark')
    allow_unknown: bool = setting(False, 'go on where most of the text is unknown words')
    length: int = setting(512, 'L, tokens of a sequence', least=8)
    validation_fraction: float = setting(
        0.005, 'share of the text that is held out', above=0, below=1)
    cache: str = setting('data', 'where prepared text is kept')
    workers: int = setting(8, 'processes that make batches; 0: a thread of this one', least=0)
    lower_is_better = ('loss', 'perplexity')

    def __post_init__(self) -> None:
        check_settings(self, 'data')

    def check(self, model: ModelConfig) -> None:
        """Refuses sequences that the model cannot take.

        Raises:
          Refusal: they are too long, or there is no corpus.
        """
        if self.length > model.max_length:
            raise Refusal(f'data.length = {self.length} exceeds model.max_length = '
                          f'{model.max_length}: shorten one or enlarge the other.')

    def prepare(self, vocabulary: str, log: Callable[[str], None]) -> Prepared:
        """The corpus as packed records; `vocabulary` is what data.vocab = '' stands for.

        Raises:
          Refusal: what is configured cannot be read or does not fit.
        """
        if not self.corpus.strip():
            raise Refusal("data.corpus is empty: give globs of text files, a prepared folder, "
                          "'tfds:NAME' or 'state-of-the-union'.")
        return dataset.prepare(
            self.corpus, vocab=self.vocab or vocabulary, vocab_size=self.vocab_size,
            lowercase=self.lowercase, strip_accents=self.strip_accents, encoding=self.encoding,
            allow_unknown=self.allow_unknown, length=self.length,
            validation_fraction=self.validation_fraction, cache=self.cache, log=log)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Records are full: all batches have one length."""
        return (self.length,)

    def real(self, batch: Batch) -> Bool[Array, 'T']:
        """Tokens within the lengths of their rows."""
        return real_tokens(batch)

    def metrics(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Mean loss in nats, and the share of the predicted tokens that were guessed right."""
        return {'loss': sums['loss'] / sums['terms'], 'accuracy': sums['correct'] / sums['terms']}

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Data, split: str,
    ) -> dict[str, float]:
        """The same, and the perplexity, the exponential of the loss."""
        values = {name: float(value) for name, value in self.metrics(sums).items()}
        return values | {'perplexity': float(np.exp(np.float64(values['loss'])))}


def real_tokens(batch: Batch) -> Bool[Array, 'T']:
    """Which tokens of a batch lie within the lengths of their rows."""
    positions = jnp.arange(batch['tokens'].shape[1])[None]
    return rearrange(positions < batch['lengths'][:, None], 'b l -> (b l)')
