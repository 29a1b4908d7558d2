"""Texts to tokens as models in use read them: what is cut off is counted."""

import dataclasses
import sys
from collections.abc import Sequence

from pkm_jax.data import sequences
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.prediction.batches import Encoded
from pkm_jax.prediction.texts import Text

_WHOLE = 10 ** 9    # tokens: no text is cut


@dataclasses.dataclass
class Tally:
    """What was read: `tokens` of all texts, texts that were cut off, and the most tokens of one."""
    longest: int
    tokens: int = 0
    truncated: int = 0

    def print_truncated(self, texts: int) -> None:
        """Says on standard error how many of so many texts were cut off, if any were."""
        if self.truncated:
            print(f'{self.truncated:,} of {texts:,} texts were cut off: the model takes '
                  f'{self.longest:,} tokens.', file=sys.stderr)


class Cutter:
    """Cuts texts to [CLS] … [SEP] as transformers does: names of special tokens are these tokens.

    longest: most tokens of a text, which loses its end. A `prompt` has no [SEP] at its end, and
    loses its beginning.
    """

    def __init__(self, vocabulary: Vocabulary, longest: int, *, prompt: bool = False):
        self._tokenizer = vocabulary.tokenizer()
        self._tokenizer.encode_special_tokens = False
        self._first = [vocabulary.cls_id]
        self._last = [] if prompt else [vocabulary.sep_id]
        self._room, self._prompt = longest - 1 - len(self._last), prompt
        self.tally = Tally(longest)

    def __call__(self, content: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and those that were cut off."""
        ids = self._tokenizer.encode(content, add_special_tokens=False).ids
        excess = max(len(ids) - self._room, 0)
        kept, beyond = ((ids[excess:], ids[:excess]) if self._prompt
                        else (ids[:self._room], ids[self._room:]))
        whole = [*self._first, *kept, *self._last]
        self.tally.truncated += bool(beyond)
        self.tally.tokens += len(whole)
        return whole, beyond


def cut_as_in_training(
    vocabulary: Vocabulary, texts: Sequence[Text], tally: Tally,
) -> list[Encoded]:
    """Texts or pairs as a classifier was trained on them (data/sequences.py)."""
    found: list[Encoded] = []
    for text, whole in zip(texts, _encoded(vocabulary, texts, _WHOLE)):
        if len(whole.tokens) > tally.longest:
            tally.truncated += 1
            whole, = _encoded(vocabulary, [text], tally.longest)
        tally.tokens += len(whole.tokens)
        found.append(Encoded(text.content, whole.tokens.tolist(), whole.segments.tolist()))
    return found


def _encoded(vocabulary, texts, length):
    """Of all texts, which can be single or pairs, in one order."""
    found: dict[int, sequences.Tokens] = {}
    for parts in (1, 2):
        numbers = [number for number, text in enumerate(texts) if len(text.parts) == parts]
        columns = list(zip(*(texts[number].parts for number in numbers))) or [()] * parts
        seconds = columns[1] if parts == 2 else None
        found |= zip(numbers, sequences.encode(vocabulary, columns[0], seconds, length))
    return [found[number] for number in range(len(texts))]
