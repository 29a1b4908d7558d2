"""Rates of links by where devices lie, and what estimates of layouts follow from."""

import pytest

from pkm_jax.accelerators import CHIPS
from pkm_jax.memory.bytes_sent import Read
from pkm_jax.mesh import Shards
from pkm_jax.training.layout_time import (
    NOT_KNOWN,
    Rates,
    Work,
    _moved_by_update,
    seconds_by_layout,
)

READ = Read(tokens=2 ** 15, reads=128, slots=2 ** 18, width=768, itemsize=2, weight_itemsize=4)
DENSE = Work(READ, memories=2, tables=2, steps=1, itemsize=4, state=8, sparse=False, by_row=False)


@pytest.mark.parametrize('axes, share', [
    (('columns',), 1 / 2), (('rows',), 1 / 2),      # one dimension of two
    (('rows', 'columns'), 1), (('data',), 1 / 2), (('data', 'rows', 'columns'), 1)])
def test_devices_of_a_torus_have_the_links_between_them(axes, share):
    v5e = CHIPS['v5e']
    assert Rates(v5e, 256).link(Shards(4, 16, 4), axes) == v5e.links * share


def test_what_leaves_a_host_or_a_slice_goes_over_the_network():
    h100, v4 = CHIPS['h100'], CHIPS['v4']
    rates = Rates(h100, 8)
    assert rates.link(Shards(2, 2, 4), ('rows', 'columns')) == h100.links
    assert rates.link(Shards(2, 2, 4), ('data',)) == h100.network
    assert rates.link(Shards(1, 4, 4), ('columns',)) == h100.links
    assert rates.link(Shards(1, 4, 4), ('rows',)) == h100.network
    assert 0 < Rates(v4, 8).link(Shards(2, 8, 1), ('data',)) < v4.links / 20    # not published


def test_a_gradient_is_summed_over_links_and_read_by_halves():
    """What two replicas cost beyond one device is the sum; two parts halve the update."""
    h100 = Rates(CHIPS['h100'], 8)
    half = DENSE._replace(read=READ._replace(tokens=2 ** 14))
    alone = seconds_by_layout(Shards(), half, h100)
    whole, columns = (seconds_by_layout(shards, DENSE, h100)
                      for shards in (Shards(2), Shards(1, 1, 2)))
    numbers = 2 * READ.slots * READ.width
    assert whole - alone == pytest.approx(
        numbers * 4 / 450e9 + numbers * 8 / 3.35e12, abs=1e-4)
    assert alone - columns == pytest.approx(numbers * (4 + 4 + 4 + 8 + 24) / 2 / 3.35e12, abs=1e-3)


def test_a_kernel_writes_no_rows_of_updates():
    sparse = DENSE._replace(sparse=True)
    tpu, gpu, plain = (_moved_by_update(Shards(1, 2, 4), sparse, Rates(CHIPS[name], plain=plain))
                       for name, plain in (('v5e', False), ('h100', False), ('h100', True)))
    assert gpu == tpu
    assert plain - gpu == READ.slots * READ.width / 8 * 8


def test_micro_batches_sum_a_gradient_each():
    once, twice = (seconds_by_layout(Shards(2), DENSE._replace(
        steps=steps, read=READ._replace(tokens=READ.tokens // steps)), NOT_KNOWN)
        for steps in (1, 2))
    assert twice - once > 2 * READ.slots * READ.width * 4
