"""Which updates and which layout a configuration gets, and why."""

import pytest

from configs import bert_base_pkm
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.mesh import Shards
from pkm_jax.refusal import Refusal
from pkm_jax.training.layout import lay_out


def layout(devices=8, gigabytes=None, **changes):
    config = bert_base_pkm.get_config()
    for name, value in changes.items():
        section, field = name.split('__')
        target = config.memory.shards if section == 'shards' else config[section]
        target[field] = value
    run, = runs_of(config)
    return lay_out(run, devices, device_bytes=gigabytes and int(gigabytes * 1e9))


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


def test_tables_that_fit_stay_whole():
    chosen = layout(gigabytes=141)
    assert chosen.shards == Shards(8, 1, 1)
    assert '6.44 GB a device' in chosen.reasons[0] and '70.50 GB' in chosen.reasons[0]
    assert layout().shards == Shards(8, 1, 1)


@pytest.mark.parametrize('gigabytes, shards', [
    (16, Shards(8, 1, 1)), (12, Shards(4, 1, 2)), (6, Shards(2, 1, 4)),
    (3, Shards(1, 2, 4)),       # 96 columns would be too narrow
    (0.1, Shards(1, 2, 4))])    # the most there is
def test_tables_that_do_not_fit_are_split_by_columns_first(gigabytes, shards):
    chosen = layout(gigabytes=gigabytes)
    assert chosen.shards == shards
    assert ('the most there are' in chosen.reasons[0]) == (gigabytes == 0.1)


def test_given_numbers_are_kept():
    assert layout(shards__rows=2, shards__columns=2).shards == Shards(2, 2, 2)
    assert layout(shards__rows=4).shards == Shards(2, 4, 1)
    assert layout(shards__columns=8).shards == Shards(1, 1, 8)


def test_a_model_without_memory_is_replicated():
    assert layout(memory__placement='none', memory__layers=()).shards == Shards(8)


def test_replicas_say_what_they_exchange():
    reasons = layout(memory__updates='sparse', shards__columns=2, train__batch=2048).reasons
    assert '4 replicas of a table exchange rows' in reasons[1]
    reasons = layout(memory__updates='sparse', memory__sub_keys=4096, shards__columns=2).reasons
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
