"""What the page of an inspection shows, as plain values for its script."""

import base64
import math
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int, UInt8

from pkm_jax.inspection.lens import has_lens, words_of_rows
from pkm_jax.inspection.readers import Context, Readers
from pkm_jax.inspection.reading import Reads
from pkm_jax.inspection.survey import Survey
from pkm_jax.inspection.words import KINDS, Words
from pkm_jax.memory.usage import SlotCounts, usage_metrics

SLOTS_OF_WORD = 5       # of each head, on the page
WORDS_OF_SLOT = 10
LENS_WORDS = 10
CELLS = 512             # of a side of the map: more slots share a cell
CONTEXT = 48            # characters on either side of a word


def page_data(survey: Survey, source: str, shown_slots: int) -> dict[str, Any]:
    """The values; `source` names the texts, `shown_slots` of each memory have details."""
    trained = survey.trained
    return {
        'model': trained.title, 'source': source, 'texts': survey.texts,
        'tokens': survey.tally.tokens, 'kinds': KINDS, 'lens': has_lens(trained),
        'layers': [_layer(survey, layer, shown_slots) for layer in survey.readers],
        'shown': [_text(words, reads) for words, reads in survey.shown]}


def _layer(survey: Survey, layer: int, shown_slots: int) -> dict[str, Any]:
    readers, memory = survey.readers[layer], survey.trained.config.memories[layer].config
    pairs = readers.pairs()
    frequency = np.log10(np.maximum(survey.words.counts, 1))[pairs.words]
    kinds = np.asarray(survey.words.kinds)[pairs.words]
    slots, mass = memory.slots, np.maximum(np.bincount(
        pairs.slots, pairs.weights, minlength=memory.slots), 1e-30)
    of_kind = np.stack([np.bincount(pairs.slots, pairs.weights * (kinds == kind), minlength=slots)
                        for kind in range(len(KINDS))])
    of_frequency = np.bincount(pairs.slots, pairs.weights * frequency, minlength=slots)
    block = -(-memory.sub_keys // CELLS)
    selected = _cells(readers.counts.selected, block)
    in_cell = np.maximum(_cells(mass, block), 1e-30)
    read = selected > 0
    reads, reads_range = _levels(np.log10(np.maximum(selected, 1)), read)
    frequencies, frequency_range = _levels(_cells(of_frequency, block) / in_cell, read)
    # The kind whose share exceeds that of all weight by most: the commonest is most slots' largest.
    excess = [_cells(share, block) / in_cell - share.sum() / of_kind.sum() for share in of_kind]
    kind = np.argmax(excess, axis=0) + 1
    usage = usage_metrics(SlotCounts(*cast(Any, readers.counts)))
    return {
        'layer': layer, 'side': memory.sub_keys, 'block': block, 'heads': memory.heads,
        'top_k': memory.top_k, 'exact': readers.exact,
        'used': usage['top_k_usage'], 'best': usage['top_1_usage'], 'half': usage['slots_50'],
        'map': {'reads': _base64(reads), 'frequency': _base64(frequencies),
                'kind': _base64(np.where(read, kind, 0).astype(np.uint8))},
        'ranges': {'reads': reads_range, 'frequency': frequency_range},
        'slots': _slots(survey, layer, readers, of_kind / mass, shown_slots)}


def _slots(survey: Survey, layer: int, readers: Readers, kinds: Float[np.ndarray, 'kinds S'],
           shown_slots: int) -> dict[int, dict[str, Any]]:
    """Details of the slots read most, by the slot."""
    chosen, pairs = readers.most_read(shown_slots), readers.pairs()
    tokens = survey.trained.vocabulary.tokens
    lens = (words_of_rows(survey.trained, layer, chosen, min(LENS_WORDS, len(tokens)))
            if has_lens(survey.trained) else np.zeros((len(chosen), 0), np.int32))
    firsts = np.searchsorted(pairs.slots, chosen)
    ends = np.searchsorted(pairs.slots, chosen, side='right')
    found = {}
    for rank, (slot, first, end) in enumerate(zip(chosen.tolist(), firsts, ends)):
        heard = slice(first, min(end, first + WORDS_OF_SLOT))
        words = [[survey.words.names[word], _short(weight / readers.counts.mass[slot])]
                 for word, weight in zip(pairs.words[heard], pairs.weights[heard])]
        found[slot] = {
            'rank': rank + 1, 'selected': int(readers.counts.selected[slot]),
            'best': int(readers.counts.best[slot]), 'different': int(end - first), 'words': words,
            'kinds': [_short(share) for share in kinds[:, slot]],
            'contexts': [_context(context) for context in readers.contexts(slot)],
            'lens': [tokens[word] for word in lens[rank]]}
    return found


def _context(context: Context) -> list[Any]:
    text, (start, end) = context.text.text, context.text.spans[context.word]
    name = context.text.names[context.word]
    if start == end:        # [CLS] or [SEP]
        first = context.word == 0
        return ['' if first else text[-CONTEXT:], name, text[:CONTEXT] if first else '',
                _short(context.weight)]
    return [text[max(0, start - CONTEXT):start], text[start:end], text[end:end + CONTEXT],
            _short(context.weight)]


def _text(words: Words, reads: dict[int, Reads]) -> list[list[Any]]:
    """Of each word: what stands before it, itself, its kind, its best slots by layer and head."""
    found, place = [], 0
    starts = np.searchsorted(words.word_of, np.arange(len(words.names) + 1))
    for word, (start, end) in enumerate(words.spans):
        own = slice(*starts[word:word + 2])
        best = [[_best(part.slots[own, head], part.weights[own, head])
                 for head in range(part.slots.shape[1])] for part in reads.values()]
        inside = end > start
        found.append([words.text[place:start] if inside else '',
                      words.text[start:end] if inside else words.names[word],
                      words.kinds[word], best])
        place = max(place, end)
    return found


def _best(slots: Int[np.ndarray, 'pieces K'], weights: Float[np.ndarray, 'pieces K'],
          ) -> list[list[Any]]:
    """The slots of most weight, which is the mean over the pieces of a word."""
    different, places = np.unique(slots, return_inverse=True)
    mean = np.bincount(places.reshape(-1), weights.reshape(-1)) / len(slots)
    order = np.argsort(-mean, kind='stable')[:SLOTS_OF_WORD]
    return [[int(different[place]), _short(mean[place])] for place in order]


def _cells(array: np.ndarray, block: int) -> np.ndarray:
    """Sums over blocks of a map of slots, row by row."""
    side = math.isqrt(len(array))
    rest = -side % block
    square = np.pad(array.reshape(side, side), ((0, rest), (0, rest)))
    cells = (side + rest) // block
    return square.reshape(cells, block, cells, block).sum(axis=(1, 3)).reshape(-1)


def _levels(values: Float[np.ndarray, 'S'], read: np.ndarray,
            ) -> tuple[UInt8[np.ndarray, 'S'], list[float]]:
    """Values as 1 to 255 between the least and the most of what was read; 0: not read."""
    least, most = float(values[read].min()), float(values[read].max())
    shares = (values - least) / max(most - least, 1e-9)
    return np.where(read, 1 + np.round(254 * np.clip(shares, 0, 1)), 0).astype(np.uint8), [
        least, most]


def _base64(array):
    return base64.b64encode(array.tobytes()).decode('ascii')


def _short(number):
    return round(float(number), 4)
