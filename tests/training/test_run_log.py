"""What is counted and written beside training."""

import json
import time

from pkm_jax.checkpoints.pretrained import parameter_table
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.training import run_log


def test_memory_adds_its_products():
    plain = BertConfig(layers=2, width=64, attention_heads=2, feed_forward_width=128)
    memory = MemoryConfig(sub_keys=16, heads=2, top_k=4, query_width=8)
    added = BertConfig(layers=2, width=64, attention_heads=2, feed_forward_width=128, memory=memory,
                       memory_layers=(1,), placement='add')
    extra = added.forward_flops(32, 4) - plain.forward_flops(32, 4)
    assert extra == 32 * 2 * 2 * (64 * 8 + 16 * 8 + 4 * 64)


def test_parameter_table_merges_layers_and_adds_up():
    table = parameter_table({'layers/0/a/kernel': (3, 4), 'layers/1/a/kernel': (3, 4),
                                     'layers/1/memory/values': (9, 2), 'bias': (5,)})
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert '24  layers 0,1' in rows['layers/*/a/kernel']
    assert '18  layers 1' in rows['layers/*/memory/values']
    assert rows['parameters'].split()[-1] == '47'


def test_stopwatch_does_not_count_pauses():
    watch = run_log.Stopwatch()
    with watch.pause():
        time.sleep(0.2)
    assert watch.seconds() < 0.1


def test_log_drops_what_a_resumed_run_takes_again(tmp_path, capsys):
    log = run_log.RunLog(tmp_path, 'run', 0, 10)
    for step in (2, 4, 6):
        log.write('train', step, step * 100, loss=step / 10, memory={'1': {'dead': .5}})
    log.close()
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "st')      # killed in the middle of a line
    log = run_log.RunLog(tmp_path, 'run', 4, 10)
    log.write('train', 6, 600, loss=.1)
    log.show(6, .1, 1234.)
    log.close()
    written = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [(line['step'], line['loss']) for line in written] == [(2, .2), (4, .4), (6, .1)]
    assert 'run: step 6/10, loss 0.100, 1,234 tokens/s' in capsys.readouterr().out
