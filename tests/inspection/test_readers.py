"""Who reads a slot, counted as one would by hand, and in bounded memory."""

from collections import Counter

import numpy as np
import pytest

from pkm_jax.inspection import readers as module
from pkm_jax.inspection.readers import Readers, WordIndex
from pkm_jax.inspection.reading import Reads
from pkm_jax.inspection.words import Words

SLOTS, HEADS, TOP = 9, 2, 3


def some_texts(count, seed=0):
    """Texts of words w0 … w5, the third of which has two tokens, with random reads."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        size = int(rng.integers(3, 7))
        word_of = np.sort(np.append(np.arange(size), 2)).tolist()
        slots = np.stack([[rng.permutation(SLOTS)[:TOP] for _ in range(HEADS)]
                          for _ in word_of]).astype(np.int32)
        weights = rng.dirichlet(np.ones(TOP), (len(word_of), HEADS)).astype(np.float32)
        names = [f'w{number}' for number in rng.integers(0, 6, size)]
        found.append((Words('', [0] * len(word_of), word_of=word_of, names=names,
                            kinds=[0] * size), Reads(slots, weights)))
    return found


def counted(texts, chunk, shown=SLOTS):
    index, readers = WordIndex(), Readers(SLOTS, shown)
    for first in range(0, len(texts), chunk):
        readers.add([(words, index(words), reads) for words, reads in texts[first:first + chunk]])
    return index, readers


@pytest.mark.parametrize('chunk', [1, 7])
def test_counts_and_words_are_those_of_a_plain_loop(chunk):
    texts = some_texts(20)
    index, readers = counted(texts, chunk)
    selected, best, mass, pairs = Counter(), Counter(), Counter(), Counter()
    for words, reads in texts:
        for token, word in enumerate(words.word_of):
            for head in range(HEADS):
                best[reads.slots[token, head, 0]] += 1
                for slot, weight in zip(reads.slots[token, head], reads.weights[token, head]):
                    selected[slot] += 1
                    mass[slot] += float(weight)
                    pairs[int(slot), words.names[word]] += float(weight)
    for slot in range(SLOTS):
        assert readers.counts.selected[slot] == selected[slot]
        assert readers.counts.best[slot] == best[slot]
        assert readers.counts.mass[slot] == pytest.approx(mass[slot])
    found = readers.pairs()
    assert {(int(slot), index.names[word]): pytest.approx(weight)
            for slot, word, weight in zip(*found)} == pairs
    assert readers.exact
    for slot in range(SLOTS):
        assert (np.diff(found.weights[found.slots == slot]) <= 0).all()
    assert index.counts[1:] == [Counter(name for words, _ in texts for name in words.names)[name]
                                for name in index.names[1:]]
    assert readers.most_read(3).tolist() == sorted(range(SLOTS), key=lambda s: -mass[s])[:3]


def test_contexts_are_the_words_that_read_with_most_weight_of_all_heads():
    texts = some_texts(20)
    _, readers = counted(texts, 6)
    for slot in range(SLOTS):
        sums = Counter()
        for number, (words, reads) in enumerate(texts):
            for token, word in enumerate(words.word_of):
                read = reads.slots[token] == slot
                sums[number, word] += float(reads.weights[token][read].sum())
        expected = sums.most_common(module.CONTEXTS)
        found = readers.contexts(slot)
        assert [context.weight for context in found] == pytest.approx(
            [weight for _, weight in expected])
        assert [(context.text.names[context.word]) for context in found] == [
            texts[number][0].names[word] for (number, word), _ in expected]


def test_a_full_table_keeps_the_heaviest_words_and_says_so(monkeypatch):
    texts = some_texts(40)
    _, whole = counted(texts, 5)
    everything = whole.pairs()
    monkeypatch.setattr(module, 'MOST_PAIRS', 20)
    _, bounded = counted(texts, 5)
    kept = bounded.pairs()
    assert len(everything.slots) == SLOTS * 6 and len(kept.slots) <= 20
    assert whole.exact and not bounded.exact
    assert np.unique(kept.slots).tolist() == list(range(SLOTS))
    for ours, theirs in zip(bounded.counts, whole.counts):
        np.testing.assert_array_equal(ours, theirs)


def test_words_beyond_the_most_are_counted_as_one(monkeypatch):
    monkeypatch.setattr(module, 'MOST_WORDS', 3)
    index = WordIndex()
    numbers = index(Words('', [], names=['a', 'b', 'c', 'a', 'd'], kinds=[0] * 5))
    assert numbers.tolist() == [1, 2, 0, 1, 0]
    assert index.names == [module.RARER, 'a', 'b'] and index.counts == [2, 2, 1]
