"""Batches of examples of like length: all once, on any number of hosts."""

import itertools
import pickle

import numpy as np
import pytest

from pkm_jax.data.labelled import (
    PROGRAMS,
    ByLength,
    Labelled,
    LabelledExamples,
    Records,
    buckets_of,
    labelled_arrays,
)
from pkm_jax.data.loader import FILLER, BatchStream, evaluation_batches

BUCKETS = (8, 16, 32)


@pytest.fixture(scope='module')
def data():
    """101 records of 3 to 32 tokens."""
    rng = np.random.default_rng(0)
    return Labelled('', 100, {'train': Records(
        {'tokens': rng.integers(5, 99, size, np.int32), 'segments': np.zeros(size, np.int32)}
        for size in rng.integers(3, 33, 101))})


EXAMPLES = LabelledExamples(labelled_arrays(32, {}))


def stream(data, **options):
    return BatchStream(data, 'train', EXAMPLES, batch_size=12, seed=1, buckets=BUCKETS, **options)


def test_every_epoch_has_all_records_once_in_another_order(data):
    batches = stream(data)
    epochs = [[next(batches) for _ in range(9)] for _ in range(2)]
    for epoch in epochs:
        real = np.concatenate([batch['example'][batch['weights'] > 0] for batch in epoch])
        assert sorted(real.tolist()) == list(range(101))
        assert sum(len(batch['weights']) for batch in epoch) == 9 * 12
    orders = [np.concatenate([batch['example'] for batch in epoch]) for epoch in epochs]
    assert not np.array_equal(*orders)


def test_a_batch_is_as_short_as_the_bucket_that_holds_it(data):
    found = set()
    for batch in itertools.islice(stream(data), 9):
        longest = batch['lengths'].max()
        length = batch['tokens'].shape[1]
        assert length == min(bucket for bucket in BUCKETS if bucket >= longest)
        assert batch['segments'].shape == batch['tokens'].shape
        filled = batch['weights'] == 0
        assert (batch['lengths'][filled] == 0).all()
        found.add(length)
    assert len(found) > 1


def test_hosts_have_parts_of_the_same_batches_and_go_on_where_they_were(data):
    whole = stream(data)
    parts = [stream(data, process_index=index, process_count=3) for index in range(3)]
    for _ in range(11):
        batch, pieces = next(whole), [next(part) for part in parts]
        for name in batch:
            np.testing.assert_array_equal(batch[name],
                                          np.concatenate([piece[name] for piece in pieces]))
    again = stream(data)
    again.set_state(whole.get_state())
    np.testing.assert_array_equal(next(again)['tokens'], next(whole)['tokens'])


def test_an_evaluation_has_every_record_once(data):
    batches = list(evaluation_batches(data, 'train', EXAMPLES, batch_size=12, n_batches=9, seed=0,
                                      buckets=BUCKETS))
    numbers = np.concatenate([batch['example'] for batch in batches])[:101]
    assert sorted(numbers.tolist()) == list(range(101))
    assert [batch['tokens'].shape[1] for batch in batches] == sorted(
        batch['tokens'].shape[1] for batch in batches)


def test_the_order_can_be_sent_to_workers(data):
    order = ByLength(data.lengths('train'), BUCKETS, 12, FILLER, seed=1)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order))(5).numbers, order(5).numbers)


def test_a_fingerprint_is_of_what_the_records_hold(data):
    other = [dict(record) for record in data.splits['train']]
    assert Labelled('', 100, {'train': Records(other)}).fingerprint == data.fingerprint
    other[5]['tokens'] = other[5]['tokens'] + np.int32(1)
    assert Labelled('', 100, {'train': Records(other)}).fingerprint != data.fingerprint


def test_buckets_pad_as_little_as_any():
    """Against all choices of lengths; those that are no multiples end at the longest allowed."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([5, 17, 30, 33, 60, 70, 90, 99], 200, p=rng.dirichlet(np.ones(8)))

    def padded(buckets):
        return sum(min(size for size in buckets if size >= length) for length in lengths)

    multiples = [16, 32, 48, 64, 80, 96]
    least = min(padded((*some, 100)) for some in itertools.combinations(multiples, PROGRAMS - 1))
    found = buckets_of(lengths, 100)
    assert padded(found) == least and found[-1] == 100 and len(found) == PROGRAMS
    assert buckets_of(np.array([3, 20, 20]), 128) == (16, 32)
    assert buckets_of(np.array([8]), 8) == (8,)


def test_showing_data_does_not_show_records(data):
    """Grain asks for it when a stream begins: of all records it took a minute."""
    assert len(repr(data)) < 200
