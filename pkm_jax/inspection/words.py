"""Texts as words: whole ones, of the pieces that a vocabulary cuts them into, and their kinds."""

import dataclasses
import re
from collections.abc import Sequence

from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.prediction.batches import Encoded
from pkm_jax.prediction.cutting import Tally
from pkm_jax.prediction.texts import Text

KINDS = ('word', 'capitalised', 'in pieces', 'number', 'punctuation', 'special')
LONGEST = 40        # characters of a word that are kept
SPECIAL = KINDS.index('special')


@dataclasses.dataclass(frozen=True)
class Words(Encoded):
    """A text with its words, [CLS] and [SEP] among them."""
    word_of: Sequence[int] = ()                     # of each token, the number of its word
    spans: Sequence[tuple[int, int]] = ()           # of each word, in the text; (0, 0): not in it
    names: Sequence[str] = ()                       # of each word, as it is written
    kinds: Sequence[int] = ()                       # of each word, its place in KINDS


class WordCutter:
    """Cuts texts to words for a model that takes `longest` tokens."""

    def __init__(self, vocabulary: Vocabulary, longest: int):
        self._vocabulary, self._room = vocabulary, longest - 2
        self._tokenizer = vocabulary.tokenizer()
        self._tokenizer.encode_special_tokens = False
        self.tally = Tally(longest)

    def __call__(self, texts: Sequence[Text]) -> list[Words]:
        """The words of each text between [CLS] and [SEP]."""
        return [self._words(text.content) for text in texts]

    def _words(self, text: str) -> Words:
        vocabulary = self._vocabulary
        found = self._tokenizer.encode(text, add_special_tokens=False)
        self.tally.truncated += len(found.ids) > self._room
        ids = [vocabulary.cls_id, *found.ids[:self._room], vocabulary.sep_id]
        self.tally.tokens += len(ids)
        word_of, spans, pieces, before = [0], [(0, 0)], [1], None
        for word, (start, end) in zip(found.word_ids[:self._room], found.offsets):
            if word is None or word != before:
                spans.append((start, end))
                pieces.append(0)
            spans[-1] = spans[-1][0], end
            pieces[-1] += 1
            word_of.append(len(spans) - 1)
            before = word
        word_of.append(len(spans))
        names = [text[start:end].strip() for start, end in spans]
        special = vocabulary.special_tokens
        names[0] = special.cls
        firsts = {word: token for token, word in reversed([*enumerate(word_of)])}
        kinds = [SPECIAL if vocabulary.special[ids[firsts[word]]] and ids[firsts[word]]
                 != vocabulary.unk_id else kind(name, pieces[word])
                 for word, name in enumerate(names)]
        return Words(text, ids, word_of=word_of, spans=[*spans, (0, 0)],
                     names=[*(name[:LONGEST] for name in names), special.sep],
                     kinds=[*kinds, SPECIAL])


def kind(name: str, pieces: int) -> int:
    """The place in KINDS of a word of so many pieces: a class of how it is written, no more."""
    if not re.search(r'\w', name):
        found = 'punctuation'
    elif re.search(r'\d', name):
        found = 'number'
    elif pieces > 1:
        found = 'in pieces'
    else:
        found = 'capitalised' if name[0].isupper() else 'word'
    return KINDS.index(found)
