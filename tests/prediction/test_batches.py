"""Batches of few shapes whose results come back in order."""

import numpy as np

from pkm_jax.prediction.batches import Encoded, Shapes, in_order
from pkm_jax.prediction.texts import Text


def run_all(sizes, rows):
    """The results for texts of these sizes, and the shapes and real lengths of all batches."""
    batches = []

    def encode(texts):
        return [Encoded(text.content, [1] * int(text.content)) for text in texts]

    def run(batch, texts):
        batches.append((batch.tokens.shape, batch.lengths.tolist()))
        sums = batch.tokens.sum(axis=1)
        return lambda: sums[:len(texts)].tolist()

    texts = (Text((str(size),), '') for size in sizes)
    found = [result for _, result in in_order(texts, encode, Shapes(rows, 100), 0, run)]
    return found, batches


def test_results_are_in_the_order_of_the_texts():
    sizes = np.random.default_rng(0).integers(1, 100, 157).tolist()
    found, batches = run_all(sizes, rows=4)
    assert found == sizes
    assert {shape for shape, _ in batches} <= {(4, 32), (4, 64), (4, 100)}


def test_texts_of_like_length_share_a_batch():
    """After the first windows, short and long ones alternating are not padded to the long."""
    _, batches = run_all([5, 90] * 64, rows=4)
    mixed = [lengths for _, lengths in batches if min(lengths) < 90 < max(lengths) + 1]
    assert len(batches) == 32 and len(mixed) <= 6


def test_rows_without_a_text_have_no_tokens():
    _, batches = run_all([3, 3], rows=4)
    assert batches == [((4, 32), [3, 3, 0, 0])]


def test_a_text_is_not_read_before_it_is_needed():
    read = []

    def texts():
        for number in range(1000):
            read.append(number)
            yield Text(('2',), '')

    stream = in_order(texts(), lambda some: [Encoded('', [1, 1]) for _ in some], Shapes(2, 64), 0,
                      lambda batch, some: lambda: [0] * len(some))
    next(stream)
    assert len(read) == 2
