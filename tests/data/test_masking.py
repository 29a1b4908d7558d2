import dataclasses
import itertools

import numpy as np
import pytest

from pkm_jax.data.masking import Masking, predictions_per_record
from pkm_jax.data.vocabulary import SpecialTokens, word_pieces
from pkm_jax.refusal import Refusal

LENGTH = 128
VOCABULARY = word_pieces((*dataclasses.astuple(SpecialTokens()), *(f'word{n}' for n in range(500)),
                          *(f'##piece{n}' for n in range(300))))
MASK = VOCABULARY.mask_id
MASKING = Masking(VOCABULARY, seed=7, rate=0.15, whole_word=False, slots=20, length=LENGTH)
WHOLE_WORDS = dataclasses.replace(MASKING, whole_word=True, slots=30)


def records(number: int) -> np.ndarray:
    """Records [CLS] … [SEP] … [SEP] of random tokens, [UNK] among them."""
    random = np.random.default_rng(0)
    tokens = random.integers(5, len(VOCABULARY.tokens), size=(number, LENGTH), dtype=np.int32)
    tokens[:, 0] = VOCABULARY.cls_id
    tokens[:, [60, -1]] = VOCABULARY.sep_id
    tokens[:, 30] = VOCABULARY.unk_id
    return tokens


def mask_all(masking: Masking, tokens: np.ndarray):
    return [masking(row, 0, number) for number, row in enumerate(tokens)]


@pytest.mark.parametrize('masking', [MASKING, WHOLE_WORDS])
def test_fifteen_percent_are_chosen_and_treated_80_10_10(masking):
    tokens = records(2_000)
    results = mask_all(masking, tokens)
    chosen = sum(len(positions) for _, positions, _ in results)
    assert abs(chosen / (~VOCABULARY.special[tokens]).sum() - 0.15) < 0.002
    after = np.concatenate([masked[positions] for masked, positions, _ in results])
    labels = np.concatenate([labels for _, _, labels in results])
    deviation = 4 / (2 * chosen ** 0.5)   # four standard deviations of a share, at most
    assert abs((after == MASK).mean() - 0.8) < deviation
    assert abs((after == labels).mean() - 0.1) < deviation
    replaced = after[(after != MASK) & (after != labels)]
    assert abs(len(replaced) / chosen - 0.1) < deviation
    assert not VOCABULARY.special[replaced].any()
    assert len(np.unique(replaced)) > 700   # drawn from the whole vocabulary


@pytest.mark.parametrize('masking', [MASKING, WHOLE_WORDS])
def test_special_tokens_are_never_chosen_and_other_tokens_never_changed(masking):
    tokens = records(200)
    for row, (masked, positions, labels) in zip(tokens, mask_all(masking, tokens)):
        assert not VOCABULARY.special[row[positions]].any()
        np.testing.assert_array_equal(labels, row[positions])
        assert len(np.unique(positions)) == len(positions) <= masking.slots
        elsewhere = np.delete(np.arange(LENGTH), positions)
        np.testing.assert_array_equal(masked[elsewhere], row[elsewhere])


def test_every_position_is_chosen_equally_often():
    tokens = records(4_000)
    chosen = np.concatenate([positions for _, positions, _ in mask_all(MASKING, tokens)])
    counts = np.bincount(chosen, minlength=LENGTH)
    ordinary = ~VOCABULARY.special[tokens[0]]
    expected = 4_000 * 0.15
    assert (np.abs(counts[ordinary] - expected) < 5 * (expected * 0.85) ** 0.5).all()
    assert counts[~ordinary].sum() == 0


def test_whole_words_are_chosen_whole():
    tokens = records(200)
    for row, (_, positions, _) in zip(tokens, mask_all(WHOLE_WORDS, tokens)):
        chosen = np.zeros(LENGTH, bool)
        chosen[positions] = True
        ordinary = np.flatnonzero(~VOCABULARY.special[row])
        after_special = np.diff(ordinary, prepend=-1) > 1
        words = np.cumsum(~VOCABULARY.continuation[row[ordinary]] | after_special)
        for word in np.unique(words):
            assert len(set(chosen[ordinary[words == word]])) == 1


@pytest.mark.parametrize('slots', [10, 12, 40])
@pytest.mark.parametrize('pieces', [1, 2, 3, 6, 9, 62])
def test_whole_words_are_fifteen_percent_for_words_of_any_length(slots, pieces):
    length, number = 64, 4_000
    masking = dataclasses.replace(WHOLE_WORDS, slots=slots, length=length)
    row = np.array([VOCABULARY.cls_id, *np.where(np.arange(62) % pieces, 600, 10),
                    VOCABULARY.sep_id], np.int32)
    chosen = np.array([len(masking(row, 0, record)[1]) for record in range(number)])
    assert chosen.max() <= slots
    assert abs(chosen.mean() - 9.3) < 4 * chosen.std() / number ** 0.5 + 1e-9


def test_a_word_ends_at_a_separator():
    words = word_pieces((*dataclasses.astuple(SpecialTokens()), 'a', '##b'))
    masking = dataclasses.replace(WHOLE_WORDS, vocabulary=words)
    row = np.array([2, 5, 3, 6, 3], np.int32)       # a [SEP] ##b: two words
    assert all(len(masking(row, 0, record)[1]) == 1 for record in range(50))


def test_masks_depend_on_seed_epoch_and_record_alone():
    row = records(1)[0]

    def positions(seed: int, epoch: int, record: int) -> bytes:
        return dataclasses.replace(MASKING, seed=seed)(row, epoch, record)[1].tobytes()

    places = list(itertools.product(range(3), repeat=3))
    found = [positions(*place) for place in places]
    assert len(set(found)) == len(places)
    assert [positions(*place) for place in reversed(places)] == found[::-1]


def test_short_and_empty_records():
    cls, sep, word = VOCABULARY.cls_id, VOCABULARY.sep_id, 10
    assert len(MASKING(np.array([cls, word, sep], np.int32), 0, 0)[1]) == 1
    assert len(MASKING(np.array([cls, sep], np.int32), 0, 0)[1]) == 0


def test_unusable_settings_are_refused():
    with pytest.raises(Refusal, match='mask_rate is 1.5'):
        dataclasses.replace(MASKING, rate=1.5)
    with pytest.raises(Refusal, match='max_predictions is 10, .* raise max_predictions to 19'):
        dataclasses.replace(MASKING, slots=10)
    assert predictions_per_record(LENGTH, 0.15) == 19
