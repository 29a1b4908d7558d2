"""What the entry point knows of the ways to use a model."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from pkm_jax.prediction.cutting import Tally
from pkm_jax.prediction.texts import Fields, Text


@runtime_checkable
class Predictor(Protocol):
    """A way to use a model."""
    tally: Tally
    fields: Fields      # of the texts that it takes

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """A JSON-able result of each text, in order; `rows` texts are computed at a time."""

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people."""
