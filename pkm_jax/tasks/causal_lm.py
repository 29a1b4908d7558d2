"""Causal language modelling: every token from those before it, over packed documents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pkm_jax.data import tokenizer
from pkm_jax.data.dataset import Prepared
from pkm_jax.data.examples import ArraySpec, TextExamples, token_arrays
from pkm_jax.models.causal import Causal, CausalConfig
from pkm_jax.models.interface import ModelConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.interface import Batch, LossName, Outcome
from pkm_jax.tasks.text import LanguageModelling


@dataclasses.dataclass(frozen=True)
class CausalLM(LanguageModelling):
    """Each token of a record but the first is predicted from those before it.

    Records are packed: a document runs on into the next record, and [SEP] stands between two.
    """
    loss_name = LossName('Causal-LM loss', 'nats',
                         'mean cross-entropy of all tokens but the first of a record')

    def check(self, model: ModelConfig) -> None:
        """Refuses a model that sees what it should predict, or of shorter sequences.

        Raises:
          Refusal: it is none of models/causal.py.
        """
        super().check(model)
        if not isinstance(model, CausalConfig):
            raise Refusal(f"task = 'causal_lm' needs model.family = 'causal', not {model}.")

    def examples(self, data: Prepared, seed: int) -> TextExamples:
        """The records as they are: nothing in them is random."""
        return TextExamples(self.length, tokenizer.load(data.vocab_path).pad_id)

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        return token_arrays(self.length)

    def terms(self, batch: Batch) -> Float[Array, '']:
        """Tokens with one before them."""
        return jnp.sum(jnp.maximum(batch['lengths'] - 1, 0)).astype(jnp.float32)

    def outcome(
        self, model: Causal, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """Cross-entropy summed over the predicted tokens, and how many were guessed right."""
        tokens, lengths = batch['tokens'], batch['lengths']
        states, reads = model(tokens, lengths, deterministic=deterministic, rngs=rngs,
                              deltas=deltas)
        logits = model.logits(states)[:, :-1]
        following = tokens[:, 1:]
        predicted = jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]
        chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        correct = jnp.sum(predicted & (jnp.argmax(logits, axis=-1) == following), dtype=jnp.float32)
        return Outcome(jnp.sum(jnp.where(predicted, losses, 0)), {'correct': correct}, reads, {})

    def predictions(self) -> int:
        return self.length
