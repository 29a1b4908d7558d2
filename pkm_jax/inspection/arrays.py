"""slots.npz: what was counted, as arrays.

Of the memory in each layer L, with S = N² slots (slot i·N + j has the sub-keys i and j):

    selected_L          [S] int64           how often a head read the slot
    best_L              [S] int64           how often it was a head's best
    mass_L              [S] float64         sum of the weights that it was read with
    pair_slots_L        [n] int64           slots with words that read them, slots ascending,
    pair_words_L        [n] int64           … the word, its place in `words`, heaviest first,
    pair_weights_L      [n] float64         … and the sum of its weights
    shown_slots_L       [T, H, K] int32     slots of each token of the texts shown, best first
    shown_weights_L     [T, H, K] float32   their weights, of each head summing to 1

Of the texts:

    words               [W] str             different words as they are written
    word_counts         [W] int64           how often each was there
    word_kinds          [W] int64           its kind, a place in `kinds`
    kinds               [6] str
    shown_tokens        [T] int32           ids of the tokens of the texts shown
    shown_texts         [T] int32           which of the texts shown a token is of
    shown_words         [T] int32           which word of that text
"""

from pathlib import Path

import numpy as np

from pkm_jax.inspection.survey import Survey
from pkm_jax.inspection.words import KINDS


def write_arrays(survey: Survey, path: Path) -> None:
    """Writes what the head of this file describes."""
    words, shown = survey.words, survey.shown
    arrays = {
        'words': np.array(words.names), 'word_counts': np.array(words.counts),
        'word_kinds': np.array(words.kinds), 'kinds': np.array(KINDS),
        'shown_tokens': _joined([text.ids for text, _ in shown]),
        'shown_texts': _joined([[number] * len(text.ids)
                                for number, (text, _) in enumerate(shown)]),
        'shown_words': _joined([text.word_of for text, _ in shown])}
    for layer, readers in survey.readers.items():
        arrays |= {f'{name}_{layer}': array for name, array in readers.counts._asdict().items()}
        arrays |= {f'pair_{name}_{layer}': array
                   for name, array in readers.pairs()._asdict().items()}
        arrays |= {f'shown_{name}_{layer}': np.concatenate(
            [getattr(reads[layer], name) for _, reads in shown]) for name in ('slots', 'weights')}
    np.savez_compressed(path, **arrays)


def _joined(parts):
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
