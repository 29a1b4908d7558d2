"""Dynamic masking for masked-language-model training (Devlin et al. 2019, section 3.1)."""

import dataclasses
import math

import numpy as np
from jaxtyping import Int

from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Masking:
    """Chooses `rate` of a record's tokens: 80 % become [MASK], 10 % a random token, 10 % stay.

    What is chosen depends on (seed, epoch, record) alone, through a counter-based generator, and so
    not on workers, hosts or batches. Special tokens are never chosen, nor drawn as the random
    token. The expected number is exactly `rate` of the tokens, or 1 where that is less, and never
    more than `slots`. With `whole_word` a word's pieces are chosen together; a word for which there
    is no room gives way to others, and is chosen in part only where no whole one fits.
    Raises:
      Refusal: a full record of `length` tokens needs more slots, or `rate` is no share.
    """
    vocabulary: Vocabulary
    seed: int
    rate: float
    whole_word: bool
    slots: int
    length: int

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise Refusal(f'mask_rate is {self.rate}: a share of the tokens between 0 and 1 is '
                          'needed, such as 0.15')
        needed = predictions_per_record(self.length, self.rate)
        if self.slots < needed:
            raise Refusal(f'max_predictions is {self.slots}, but {self.rate:.0%} of '
                          f'{self.length} tokens are up to {needed}: raise max_predictions to '
                          f'{needed} or lower mask_rate')

    def __call__(self, tokens: Int[np.ndarray, 'length'], epoch: int, record: int) -> tuple[
            Int[np.ndarray, 'length'], Int[np.ndarray, 'chosen'], Int[np.ndarray, 'chosen']]:
        """Masks one record's real tokens; returns them, the positions to predict and the labels."""
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, epoch, record]))
        positions = self._choose(tokens, random)
        labels = tokens[positions]
        ordinary = self.vocabulary.ordinary_ids
        drawn = ordinary[random.integers(len(ordinary), size=len(positions))]
        kind = random.random(len(positions))
        masked = tokens.copy()
        masked[positions] = np.where(kind < 0.8, self.vocabulary.mask_id,
                                     np.where(kind < 0.9, drawn, labels))
        return masked, positions, labels

    def _choose(self, tokens: Int[np.ndarray, 'length'],
                random: np.random.Generator) -> Int[np.ndarray, 'chosen']:
        """Takes words in random order until their pieces make up the number asked for."""
        candidates = np.flatnonzero(~self.vocabulary.special[tokens])
        if not candidates.size:
            return candidates
        word = np.arange(candidates.size)
        if self.whole_word:     # a word also begins where a record does, and after a special token
            word[1:] = np.cumsum(~self.vocabulary.continuation[tokens[candidates[1:]]]
                                 | (np.diff(candidates) > 1))
        order = random.permutation(word[-1] + 1)
        taken, cut, room = self._take(np.bincount(word)[order].tolist(),
                                      max(1.0, self.rate * candidates.size), random.random())
        chosen = np.zeros(order.size, bool)
        chosen[order[taken]] = True
        chosen = chosen[word]
        if cut is not None:
            chosen[np.flatnonzero(word == order[cut])[:room]] = True
        return candidates[chosen]

    def _take(self, pieces: list[int], wanted: float, draw: float) -> tuple[list[int], int | None,
                                                                            int]:
        """Which of the words with so many `pieces` to take, in this order, so that on average
        `wanted` pieces are taken; then a word to cut, and to how many pieces.

        The word that would pass the number is taken with the probability that makes up for it.
        """
        taken, so_far, cut = [], 0, None
        for place, count in enumerate(pieces):
            if so_far + count > self.slots:
                cut = place if cut is None else cut
            elif so_far + count < wanted:
                taken.append(place)
                so_far += count
            else:
                if draw >= 1 - (wanted - so_far) / count:
                    taken.append(place)
                return taken, None, 0
        room = self.slots - so_far
        if cut is None or draw < 1 - (wanted - so_far) / room:
            return taken, None, 0
        return taken, cut, room


def predictions_per_record(length: int, rate: float) -> int:
    """The most predictions that a record of `length` tokens, [CLS] and [SEP] included, needs."""
    return max(1, math.ceil(rate * (length - 2)))
