"""Masked language modelling (Devlin et al. 2019, section 3.1), for a BERT with an 'mlm' head."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from pkm_jax.data import tokenizer
from pkm_jax.data.dataset import Prepared
from pkm_jax.data.examples import ArraySpec, MaskedExamples, masked_arrays
from pkm_jax.data.masking import Masking, predictions_per_record
from pkm_jax.fields import setting
from pkm_jax.models.bert import Bert, BertConfig
from pkm_jax.models.interface import ModelConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.interface import Batch, LossName, Outcome
from pkm_jax.tasks.text import LanguageModelling


@dataclasses.dataclass(frozen=True)
class MaskedLM(LanguageModelling):
    """Words that were masked are predicted from those on both sides.

    Raises:
      Refusal: a value is out of its range, or there are fewer predictions than masks.
    """
    mask_rate: float = setting(0.15, 'share of the tokens that is predicted', above=0, below=1)
    max_predictions: int = setting(80, 'of a sequence: at least what mask_rate masks', least=1)
    whole_word: bool = setting(False, "mask all pieces of a word together")
    loss_name = LossName('Masked-LM loss', 'nats', 'mean cross-entropy of the masked tokens')

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = predictions_per_record(self.length, self.mask_rate)
        if self.max_predictions < needed:
            raise Refusal(f'data.max_predictions = {self.max_predictions}, but data.mask_rate = '
                          f'{self.mask_rate} masks up to {needed} of {self.length} tokens: set it '
                          f'to {needed} or more.')

    def check(self, model: ModelConfig) -> None:
        """Refuses a model without the head, or of shorter sequences.

        Raises:
          Refusal: it has none.
        """
        super().check(model)
        if not isinstance(model, BertConfig) or 'mlm' not in model.output_heads:
            raise Refusal(f"task = 'masked_lm' needs a BERT with an 'mlm' head, not {model}.")

    def examples(self, data: Prepared, seed: int) -> MaskedExamples:
        """Masked anew in each epoch, by the seed."""
        vocabulary = tokenizer.load(data.vocab_path)
        return MaskedExamples(Masking(vocabulary, seed, self.mask_rate, self.whole_word,
                                      self.max_predictions, self.length))

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        return masked_arrays(self.length, self.max_predictions)

    def terms(self, batch: Batch) -> Float[Array, '']:
        """Masked words."""
        return jnp.sum(batch['mlm_weights'])

    def outcome(
        self, model: Bert, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """Cross-entropy summed over the masked words, and how many were guessed right."""
        states, reads = model(batch['tokens'], batch['segments'], batch['lengths'],
                              deterministic=deterministic, rngs=rngs, deltas=deltas)
        logits = model.mlm_logits(states, batch['mlm_positions'])
        labels, weights = batch['mlm_labels'], batch['mlm_weights']
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.sum(jnp.where(jnp.argmax(logits, axis=-1) == labels, weights, 0))
        return Outcome(jnp.sum(losses * weights), {'correct': correct}, reads, {})

    def predictions(self) -> int:
        return self.max_predictions
