"""Which updates and which layout a configuration gets, and why."""

import re

import pytest

from configs import bert_base_pkm
from pkm_jax.accelerators import CHIPS
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.memory.bytes_sent import Read
from pkm_jax.mesh import Shards
from pkm_jax.refusal import Refusal
from pkm_jax.training.layout import compact_bytes, lay_out
from pkm_jax.training.layout_time import CPU, NOT_KNOWN, Rates, Work

H100 = Rates(CHIPS['h100'], 8)
SPARSE = Work(Read(tokens=2 ** 12, reads=128, slots=2 ** 22, width=768, itemsize=2, weight_itemsize=4),
              memories=1, tables=1, steps=1, itemsize=2, state=8, sparse=True, by_row=False)


def layout(devices=8, gigabytes=None, rates=NOT_KNOWN, **changes):
    config = bert_base_pkm.get_config()
    for name, value in changes.items():
        section, field = name.split('__')
        target = config.memory.shards if section == 'shards' else config[section]
        target[field] = value
    run, = runs_of(config)
    return lay_out(run, devices, device_bytes=gigabytes and int(gigabytes * 1e9), rates=rates)


def test_updates_are_sparse_where_a_step_cannot_reach_every_row():
    dense = layout()
    assert not dense.sparse and '67,108,864 reads of a step can reach' in dense.reasons[0]
    sparse = layout(memory__sub_keys=4096, train__batch=64)       # 16,777,216 slots
    assert sparse.sparse and '4,194,304 reads of a step cannot reach' in sparse.reasons[0]
    assert not layout(memory__sub_keys=2048, train__batch=64).sparse      # as many slots as reads
    assert not layout(memory__sub_keys=2048, train__batch=64,
                      train__gradient_accumulation_steps=4).sparse


def test_updates_as_configured():
    assert layout(memory__updates='sparse').sparse
    assert not layout(memory__sub_keys=4096, train__batch=64, memory__updates='dense').sparse
    assert layout(memory__values_dtype='bfloat16').sparse


def test_the_least_time_of_what_fits_is_chosen_and_said():
    """Two H100s, 32 × 512 tokens each, measured: by columns 39.8 ms, by rows 40.9, whole 46.5."""
    said = layout(2, 80, H100, train__batch=64).reasons[0]
    assert '3.22 GB a device with optimiser state and gradient, in 1 × 2 parts' in said
    found = re.search(r'the least time by estimate of those that fit \(half of a device is 40.00 GB'
                      r'\): ([\d.]+) ms a step; next 2 × 1, ([\d.]+) ms$', said)
    columns, rows = map(float, found.groups())
    whole = float(re.search(r'next 1 × 1, ([\d.]+) ms', layout(
        2, 80, H100, train__batch=64, shards__columns=1).reasons[0])[1])
    assert 0 < rows - columns < 2 and 5 < whole - columns < 8


def test_unknown_devices_are_compared_by_bytes():
    chosen = layout()
    assert chosen.shards == Shards(4, 1, 2)
    assert 'MB sent or as good as sent a step; next 2 × 2' in chosen.reasons[0]


@pytest.mark.parametrize('gigabytes, shards', [
    (141, Shards(4, 1, 2)), (6, Shards(2, 2, 2)),
    (3, Shards(1, 4, 2)),       # 192 columns would be nothing for kernels, if these were GPUs
    (0.1, Shards(1, 4, 2))])    # the most there is
def test_what_does_not_fit_is_not_chosen(gigabytes, shards):
    chosen = layout(gigabytes=gigabytes)
    assert chosen.shards == shards
    assert ('the most there are' in chosen.reasons[0]) == (gigabytes == 0.1)


@pytest.mark.parametrize('shards, rates, slots, arrays', [
    (Shards(), H100, 2 ** 22, .5), (Shards(1, 2, 2), H100, 2 ** 22, .5),
    (Shards(), H100._replace(plain=True), 2 ** 22, 4), (Shards(), NOT_KNOWN, 2 ** 22, 4),
    (Shards(), Rates(CHIPS['v5e']), 2 ** 22, 4),
    (Shards(1, 1, 4), H100, 2 ** 22, 4),        # 192 columns, which no kernel for GPUs reads
    (Shards(8), H100, 2 ** 8, 4)])      # replicas exchange rows
def test_gpus_hold_gradients_of_rows_alone_where_they_have_kernels(shards, rates, slots, arrays):
    """As float32 arrays of the touched rows."""
    work = SPARSE._replace(read=SPARSE.read._replace(slots=slots))
    one = 4 * min(slots // shards.rows, 2 ** 19) * 768 // shards.columns
    assert compact_bytes(shards, work, rates) == arrays * one


def test_small_tables_stay_whole():
    small = dict(memory__sub_keys=32, memory__top_k=8, train__batch=1024)
    assert layout(8, 80, H100, **small).shards == Shards(8)
    assert layout(8, None, Rates(CPU, plain=True), **small).shards == Shards(8)


def test_a_copy_of_a_table_stays_within_a_slice():
    """Few tokens: it takes less to gather them over the network than to sum gradients over it, but
    no mesh is made of such groups of TPUs. Of GPUs in several hosts there is one."""
    few = dict(train__batch=16, train__warmup=1)
    assert layout(16, 16, Rates(CHIPS['v5e'], 8), **few).shards == Shards(2, 2, 4)
    assert layout(16, 80, Rates(CHIPS['h100'], 8), **few).shards == Shards(1, 8, 2)


def test_parts_are_as_wide_as_kernels_read_them():
    """768 columns: 192 of them for kernels of TPUs, never for those of GPUs."""
    few = dict(train__batch=16, train__warmup=1)
    for devices in (2, 4, 8, 16):
        columns = 768 // layout(devices, 80, Rates(CHIPS['h100'], 8), **few).shards.columns
        assert columns % 128 == 0
    assert layout(16, 16, Rates(CHIPS['v5e'], 8), **few).shards.columns == 4
    assert layout(8, 80, H100, shards__columns=4).shards.columns == 4     # as asked for
    assert layout(2, 80, H100, memory__value_width=320, **few).shards.columns == 2   # for plain jnp


def test_given_numbers_are_kept():
    assert layout(shards__rows=2, shards__columns=2).shards == Shards(2, 2, 2)
    assert layout(shards__rows=4).shards == Shards(2, 4, 1)
    assert layout(shards__columns=8).shards == Shards(1, 1, 8)


def test_a_model_without_memory_is_replicated():
    assert layout(memory__placement='none', memory__layers=()).shards == Shards(8)


def test_replicas_say_what_they_exchange():
    halves = dict(memory__updates='sparse', shards__rows=1, shards__columns=2)
    reasons = layout(train__batch=2048, **halves).reasons
    assert '4 replicas of a table exchange rows' in reasons[1]
    reasons = layout(memory__sub_keys=4096, **halves).reasons
    assert '4 replicas of a table exchange tokens' in reasons[1]


@pytest.mark.parametrize('changes, message', [
    ({'shards__rows': 3}, r'memory.shards.rows = 3.* 8 devices'),
    ({'shards__columns': 16}, r'memory.shards.columns = 16'),
    ({'shards__rows': 8, 'shards__columns': 2}, r'product must divide the 8 devices'),
    ({'memory__updates': 'lazy'}, r"memory.updates = 'lazy'"),
    ({'memory__updates': 'dense', 'memory__values_dtype': 'bfloat16'}, r"Set 'float32'"),
    ({'train__values_optimizer': 'rowwise_adam'}, r"'rowwise_adam' is none of .* dense"),
    ({'train__values_optimizer': 'lion', 'memory__updates': 'sparse'}, r"'lion' is none of"),
])
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(Refusal, match=message):
        layout(**changes)
