"""A run goes on in a folder whose files were lost or damaged, and says so."""

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pkm_jax.checkpoints import checksums, store
from pkm_jax.mesh import OWN
from pkm_jax.refusal import Refusal
from pkm_jax.training import loop
from tests.training.events import scalars
from tests.training.runs import train


def weights(folder):
    stored = store.read_weights(store.newest(folder))
    return {name: np.asarray(array) for name, array in stored.items()}


def lines(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_everything_beside_the_checkpoints_is_mended_and_said(config, capsys):
    folder = train(config)
    expected, whole = weights(folder), {name: (folder / name).read_bytes()
                                        for name in ('vocab.txt', 'tokenizer.json')}
    shutil.rmtree(folder / 'checkpoints' / '6')
    (folder / 'vocab.txt').unlink()
    (folder / 'tokenizer.json').write_bytes(whole['tokenizer.json'][:200])
    (folder / 'config.json').unlink()
    metrics = (folder / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (folder / 'metrics.jsonl').write_text(''.join(metrics[:2])[:-9])
    shutil.rmtree(folder / 'tensorboard')
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    for name, content in whole.items():
        assert (folder / name).read_bytes() == content
    assert 'vocab.txt is missing' in said and 'tokenizer.json is damaged' in said
    assert 'has checkpoints and no config.json' in said and (folder / 'config.json').exists()
    assert 'lines are missing of steps 1 to 3' in said
    assert [line['step'] for line in lines(folder) if line['kind'] == 'train'] == [4, 6]
    for name, array in weights(folder).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    losses = [(f'{line["kind"]}/loss', line['step'], np.float32(line['loss']))
              for line in lines(folder) if 'loss' in line]
    assert losses == [found for found in scalars(folder / 'tensorboard') if found[0].endswith('/loss')]


@pytest.mark.slow
def test_a_saved_place_of_the_stream_with_a_flipped_bit_is_not_gone_on_from(config, tmp_path, caplog):
    """Nor are weights started from."""
    folder = train(config)
    expected = weights(folder)
    path = folder / 'checkpoints/6/progress/metadata'
    content = bytearray(path.read_bytes())
    content[content.index(b'"batches": 6') + 11] ^= 1        # 7
    path.write_bytes(content)
    config.update(workdir=str(tmp_path / 'other'), init_from=str(folder))
    with pytest.raises(Refusal, match='checkpoints/6 is damaged: progress/metadata is not what was'):
        train(config)
    assert path.exists()
    config.update(workdir=str(folder), init_from='')
    train(config)
    assert 'checkpoints/6 is damaged: progress/metadata is not what was written' in caplog.text
    for name, array in weights(folder).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_over_other_devices_and_micro_batches(config, monkeypatch, capsys):
    """The same examples; without dropout and batch norm the same numbers but for rounding."""
    config.model.update(dropout=0., attention_dropout=0.)
    config.memory.query_norm = 'layer'
    folder = train(config)
    expected, metrics = weights(folder), lines(folder)
    shutil.rmtree(folder / 'checkpoints' / '6')
    mesh = jax.make_mesh((1, 1, 1), OWN.names, devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    monkeypatch.setattr(loop, 'make_mesh', lambda shards: mesh)
    config.train.gradient_accumulation_steps = 2
    config.train.batch = 32
    with pytest.raises(Refusal, match='train.batch: 16 there, 32 here'):
        train(config)
    config.train.batch = 16
    train(config)
    assert 'gradient_accumulation_steps is changed from 1 to 2' in capsys.readouterr().out
    for name, array in weights(folder).items():
        np.testing.assert_allclose(array, expected[name], atol=2e-5, err_msg=name)
    for line, other in zip(lines(folder), metrics, strict=True):
        assert (line['kind'], line['step']) == (other['kind'], other['step'])
        assert line.get('loss', 0.) == pytest.approx(other.get('loss', 0.), abs=1e-5)


@pytest.mark.slow
def test_a_folder_that_is_gone_ends_the_run_in_one_line(config, monkeypatch, tmp_path):
    """Unmounted, or removed by somebody, after the first checkpoint."""
    real, folder = loop.loader.BatchStream.__next__, Path(config.workdir)

    def gone(self):
        if self._returned == 4:
            while not (folder / 'checkpoints/3' / checksums.CHECKSUMS).exists():
                time.sleep(.01)
            folder.rename(tmp_path / 'elsewhere')
        return real(self)

    monkeypatch.setattr(loop.loader.BatchStream, '__next__', gone)
    with pytest.raises(Refusal, match=r'run/slot_counts_1.npz: No such file or directory. The run'):
        train(config)
    assert not folder.exists()
    assert store.whole(store.of_run(tmp_path / 'elsewhere')).name == '3'
