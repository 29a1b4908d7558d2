"""Sorting networks over Python lists of arrays: every array element is a row of its own.

A wire is a pair (score, index) of arrays of one shape; a comparator is five vector instructions.
With a row per GPU thread, or per place in a TPU's vector registers, a network needs no exchange
between them at all. Wires of another kind than arrays bring comparators of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

Wire = tuple    # (score, index)


def _compare(a, b):
    """The wire of the larger score, and the other."""
    swap = a[0] < b[0]
    return ((jnp.maximum(a[0], b[0]), jnp.where(swap, b[1], a[1])),
            (jnp.minimum(a[0], b[0]), jnp.where(swap, a[1], b[1])))


def _larger(a, b):
    return jnp.maximum(a[0], b[0]), jnp.where(a[0] > b[0], a[1], b[1])


class Comparators(NamedTuple):
    """What is done with two wires."""
    compare: Callable[[Wire, Wire], tuple[Wire, Wire]]      # the larger and the smaller
    larger: Callable[[Wire, Wire], Wire]                    # of equal ones, or with NaN, the second


ARRAYS = Comparators(_compare, _larger)


def sort(wires: list[Wire], of: Comparators = ARRAYS) -> list[Wire]:
    """Wires in descending order of score: Batcher's odd-even merge sort, any power of two of them.

    191 comparators for 32 wires. Knuth, The Art of Computer Programming 3, 5.2.2 (algorithm M).
    """
    wires, size = list(wires), len(wires)
    p = size // 2
    while p:
        q, r, d = size // 2, 0, p
        while True:
            for i in range(size - d):
                if i & p == r:
                    wires[i], wires[i + d] = of.compare(wires[i], wires[i + d])
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2
    return wires


def best_of_two(a: list[Wire], b: list[Wire], of: Comparators = ARRAYS) -> list[Wire]:
    """The best len(a) wires of two descending lists, descending; b is as long as a, or shorter.

    One of each pair a[i], b[-1 - i] is among the best; together they form a bitonic sequence. Of
    equal scores, and where one is NaN, that of b stays: what fills a list at first never does.
    """
    kept = list(a)
    for i, wire in enumerate(b):
        kept[len(a) - 1 - i] = of.larger(kept[len(a) - 1 - i], wire)
    return _merge_bitonic(kept, of)


def merge(a: list[Wire], b: list[Wire], of: Comparators = ARRAYS) -> list[Wire]:
    """All wires of two descending lists, descending, by Batcher's odd-even merge of any lengths."""
    if not a or not b:
        return list(a) + list(b)
    if len(a) == len(b) == 1:
        return list(of.compare(a[0], b[0]))
    return _interleave(merge(a[::2], b[::2], of), merge(a[1::2], b[1::2], of), of)


def best_sums(
    k: int, pair: Callable[[int, int], Wire], of: Comparators = ARRAYS,
) -> list[Wire]:
    """The k best sums of two descending lists, descending, from the pairs of ranks with i·j ≤ k.

    `pair(i, j)` is the wire of the sum at ranks i and j, 0-based. Pairs (i, j ≥ i) for each i, and
    (i > j, j) for each j, are descending lists as they stand.
    """
    lists = []
    for r in range(k):
        last = k // (r + 1)
        lists.append([pair(r, j) for j in range(r, last)])
        lists.append([pair(i, r) for i in range(r + 1, last)])
    lists = [one for one in lists if one]
    while len(lists) > 1:
        lists.sort(key=len)
        lists = [merge(lists[0], lists[1], of)[:k], *lists[2:]]
    return lists[0]


def _interleave(even, odd, of):
    """The last stage of the odd-even merge: even[0], then even[i + 1] against odd[i]."""
    merged = [even[0]]
    for i, wire in enumerate(odd):
        if i + 1 < len(even):
            merged += of.compare(even[i + 1], wire)
        else:
            merged.append(wire)
    return merged + even[len(odd) + 1:]


def _merge_bitonic(wires, of):
    """A bitonic sequence of a power of two of wires, in descending order."""
    wires, d = list(wires), len(wires) // 2
    while d:
        for i in range(len(wires)):
            if not i & d:
                wires[i], wires[i + d] = of.compare(wires[i], wires[i + d])
        d //= 2
    return wires
