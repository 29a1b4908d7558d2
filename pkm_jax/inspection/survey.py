"""One pass over texts: who reads each slot, and all reads of the first texts, which are shown."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from pkm_jax.inspection.readers import Readers, WordIndex
from pkm_jax.inspection.reading import Reads, read_texts
from pkm_jax.inspection.words import WordCutter, Words
from pkm_jax.prediction.cutting import Tally
from pkm_jax.prediction.texts import Text
from pkm_jax.prediction.trained import Trained
from pkm_jax.refusal import Refusal

CHUNK = 64      # texts that are counted together


class Survey(NamedTuple):
    """What was found."""
    trained: Trained
    words: WordIndex
    readers: dict[int, Readers]                         # of each memory by its layer
    shown: list[tuple[Words, dict[int, Reads]]]         # the first texts
    texts: int
    tally: Tally                                        # of their tokens


def survey(
    trained: Trained, texts: Iterable[Text], *, shown_texts: int, shown_slots: int, rows: int,
) -> Survey:
    """Reads texts through a model, `rows` at a time.

    shown_texts: how many are kept with all their reads. shown_slots: how many slots of each memory,
    those read most, keep contexts.
    Raises:
      Refusal: the model has no memory, or there is no text.
    """
    cutter, index = WordCutter(trained.vocabulary, trained.config.max_length), WordIndex()
    readers = {layer: Readers(site.config.slots, shown_slots)
               for layer, site in trained.config.memories.items()}
    shown: list[tuple[Words, dict[int, Reads]]] = []
    count, found = 0, read_texts(trained, texts, cutter, rows)
    while chunk := list(itertools.islice(found, CHUNK)):
        count += len(chunk)
        shown += chunk[:shown_texts - len(shown)]
        numbered = [(words, index(words), reads) for words, reads in chunk]
        for layer, own in readers.items():
            own.add([(words, numbers, reads[layer]) for words, numbers, reads in numbered])
    if not count:
        raise Refusal('There is no text to read: give some, or --file.')
    return Survey(trained, index, readers, shown, count, cutter.tally)
