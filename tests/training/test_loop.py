"""Whole runs of a tiny model: what they leave behind, and that they resume to the bit."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from pkm_jax.checkpoints import store
from pkm_jax.mesh import OWN
from pkm_jax.refusal import Refusal
from pkm_jax.training import loop
from tests.processes import started
from tests.training.runs import killed_after, train


def weights(folder, step=None):
    path = folder / 'checkpoints' / str(step) if step else folder
    stored = store.read_weights(store.newest(path))
    return {name: np.asarray(array) for name, array in stored.items()}


def lines(folder, kind):
    return [line for line in map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
            if line['kind'] == kind]


@pytest.fixture
def trained(config, tmp_path_factory):
    """The folder of a finished run of `config`, which a process trains once and copies."""
    kept, folder = tmp_path_factory.getbasetemp() / 'trained', Path(config.workdir)
    if kept.exists():
        shutil.copytree(kept, folder)
    else:
        shutil.copytree(train(config), kept)
    return folder


def test_a_run_leaves_what_it_promises(config, capsys):
    folder = train(config)
    assert folder == Path(config.workdir)
    assert json.loads((folder / 'config.json').read_text())['train']['steps'] == 6
    assert (folder / 'vocab.txt').exists()
    assert [line['step'] for line in lines(folder, 'train')] == [2, 3, 4, 6]
    evaluations = lines(folder, 'eval')
    assert [line['step'] for line in evaluations] == [3, 6]
    use = evaluations[-1]['memory']['1']
    assert use['slots'] == 36 and 0 < use['top_1_usage'] <= use['top_k_usage'] <= 1
    assert use['curve'][-1][0] == evaluations[-1]['eval_tokens']
    assert use['curve'][-1][1:3] == pytest.approx([use['top_1_usage'], use['top_k_usage']])
    assert 0 <= use['dead'] < 1
    counts = np.load(folder / 'slot_counts_1.npz')
    assert counts['count'].sum() == evaluations[-1]['eval_tokens'] * 2 * 3
    assert list((folder / 'tensorboard').iterdir())
    output = capsys.readouterr().out
    assert 'step 6/6' in output and 'tokens/s' in output and 'left' in output
    assert 'layers/*/memory/values' in output


@pytest.mark.slow     # tests/faults is the same in whole processes
@pytest.mark.parametrize('steps', [1, 2])
def test_killed_and_resumed_is_the_run_that_was_not(config, tmp_path, steps):
    """Bit for bit, with dropout, batch norm and accumulation; killed between two checkpoints."""
    config.train.gradient_accumulation_steps = steps
    config.memory.value_dropout = 0.1
    straight = train(config)
    with config.unlocked():
        config.workdir = str(tmp_path / 'killed')
    with killed_after(5):
        train(config)
    assert store.newest(tmp_path / 'killed').name == '3'
    resumed = train(config)
    ours, theirs = weights(resumed), weights(straight)
    assert ours.keys() == theirs.keys() and 'statistics/layers/1/memory/query_norm/var' in ours
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    assert started.lines(resumed, 'eval') == started.lines(straight, 'eval') != []
    assert [line['step'] for line in lines(resumed, 'train')] == [2, 3, 4, 6]


def test_a_finished_run_is_not_trained_again(config, trained):
    before = (trained / 'metrics.jsonl').read_text()
    train(config)
    assert (trained / 'metrics.jsonl').read_text() == before


@pytest.mark.slow
def test_a_truncated_checkpoint_falls_back_to_the_one_before(config, trained, caplog):
    expected = weights(trained)
    newest = trained / 'checkpoints' / '6'
    largest = max(newest.rglob('*'), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
    train(config)
    assert 'checkpoints/6 is damaged' in caplog.text
    assert (trained / 'checkpoints' / 'damaged-6').exists()
    for name, array in weights(trained).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.slow
def test_an_unfinished_checkpoint_is_not_believed(config, trained, caplog):
    (trained / 'checkpoints' / '6' / 'commit_success.txt').unlink()
    train(config)
    assert 'never finished' in caplog.text


def test_no_checkpoint_left_is_an_error_that_names_them(config, trained):
    for step in (3, 6):
        shutil.rmtree(trained / 'checkpoints' / str(step) / 'model')
    with pytest.raises(Refusal, match=r'None of the checkpoints .* is whole') as refusal:
        train(config)
    for step in (6, 3):
        assert f'checkpoints/{step}: model/' in str(refusal.value)
        assert (trained / 'checkpoints' / str(step)).exists()    # not renamed


@pytest.mark.slow
def test_memory_is_added_to_a_run_without_one(config, tmp_path, capsys):
    config.memory.update(placement='none', layers=())
    plain = train(config)
    config.update(workdir=str(tmp_path / 'added'), init_from=str(plain))
    config.memory.update(placement='add', layers=(1,), zero_start=True)
    config.train.learning_rate = config.train.values_learning_rate = 1e-12
    added = train(config)
    output = capsys.readouterr().out
    assert 'taken' in output and 'layers/*/memory/values' in output.split('new:')[1]
    before, after = weights(plain), weights(added)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-8, err_msg=name)
    assert (lines(added, 'eval')[-1]['loss']
            == pytest.approx(lines(plain, 'eval')[-1]['loss'], abs=1e-5))


@pytest.mark.parametrize('changes, message', [
    ({'model': {'width': 32}}, r'\(120, 16\) there, \(120, 32\) here'),
    pytest.param({'model': {'attention_heads': 4}}, 'model.attention_heads: 2 there, 4 here',
                 marks=pytest.mark.slow),
])
def test_init_from_other_sizes_names_every_mismatch(config, trained, tmp_path, changes, message):
    config.update(workdir=str(tmp_path / 'other'), init_from=str(trained), **changes)
    with pytest.raises(Refusal, match=message):
        train(config)


@pytest.mark.slow
def test_init_from_a_smaller_vocabulary_is_refused(config, tmp_path):
    source = train(config)
    vocab = tmp_path / 'vocab.txt'
    vocab.write_text((source / 'vocab.txt').read_text() + 'another\n')
    config.update(workdir=str(tmp_path / 'other'), init_from=str(source))
    config.data.vocab = str(vocab)
    with pytest.raises(Refusal, match='121 words, .* embeddings of 120'):
        train(config)


def test_init_from_nowhere(config):
    config.init_from = 'no/such/run'
    with pytest.raises(Refusal, match='no/such/run'):
        train(config)


def test_another_configuration_does_not_share_a_folder(config, trained):
    config.log.every = 1
    train(config)
    config.train.learning_rate = 0.5
    with pytest.raises(Refusal, match='train.learning_rate: 0.0001 there, 0.5 here'):
        train(config)


@pytest.mark.slow
def test_several_devices_and_one_agree(config, tmp_path, monkeypatch):
    """Batch norm over the global batch; sums differ in order only."""
    config.model.update(dropout=0., attention_dropout=0.)
    several = weights(train(config))
    assert jax.device_count() == 8
    config.workdir = str(tmp_path / 'one')
    mesh = jax.make_mesh((1, 1, 1), OWN.names, devices=jax.devices()[:1],
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    monkeypatch.setattr(loop, 'make_mesh', lambda shards: mesh)
    for name, array in weights(train(config)).items():
        np.testing.assert_allclose(array, several[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_another_layout_is_said(config, capsys):
    for batches in (4, 2):      # begun, and gone on with in the same layout
        with killed_after(batches):
            train(config)
    assert 'of the checkpoint' not in capsys.readouterr().out
    config.memory.shards.update(rows=2, columns=1)
    train(config)
    assert ('layout: 4 × 2 × 1 (data × rows × columns), of the checkpoint 8 × 1 × 1: '
            in capsys.readouterr().out)


@pytest.mark.slow
def test_a_run_can_be_lengthened_on_purpose(config, capsys):
    folder = train(config)
    config.train.steps = 9
    train(config)
    assert 'train.steps is raised from 6 to 9' in capsys.readouterr().out
    assert [line['step'] for line in lines(folder, 'eval')] == [3, 6, 9]
    assert json.loads((folder / 'config.json').read_text())['train']['steps'] == 9


@pytest.mark.slow
def test_a_text_that_changed_is_said_to_be_that(config, corpus, tmp_path):
    """With a vocabulary trained on it, and with one that stays: no checkpoint is called damaged."""
    changed = 'text or its vocabulary has changed since the run began'
    text = tmp_path / 'text.txt'
    text.write_text(corpus.read_text())
    config.data.corpus = str(text)
    folder = train(config)
    shutil.rmtree(folder / 'checkpoints' / '6')
    text.write_text(text.read_text() + '\nhippopotamus xylophone zeugma 4242\n' * 9)
    with pytest.raises(Refusal, match=changed):
        train(config)
    config.update(workdir=str(tmp_path / 'kept'), init_from='')
    config.data.vocab = str(folder)
    text.write_text(corpus.read_text())
    folder = train(config)
    shutil.rmtree(folder / 'checkpoints' / '6')
    text.write_text(text.read_text() + '\nmemory key value query slot\n')
    with pytest.raises(Refusal, match=changed):
        train(config)
    assert [path.name for path in (folder / 'checkpoints').iterdir()] == ['3']


@pytest.mark.parametrize('room', [      # the second holds all numbers, not all files
    pytest.param(1000, marks=pytest.mark.slow), 200_000])
def test_a_full_disk_is_named_before_a_checkpoint_is_begun(config, monkeypatch, room):
    real = shutil.disk_usage
    rooms = iter([10 ** 9, 10 ** 9, room])      # at the start, for steps 3 and 6
    monkeypatch.setattr(store.shutil, 'disk_usage',
                        lambda path: real(path)._replace(free=next(rooms)))
    with pytest.raises(Refusal, match=r'No room for the checkpoint of step 6.* of steps \[3\] are whole'):
        train(config)
    assert store.newest(Path(config.workdir)).name == '3'


@pytest.mark.slow
@pytest.mark.parametrize('seed', [2 ** 31, 2 ** 32 - 1])
def test_seeds_beyond_int32_train(config, seed):
    config.seed = seed
    config.train.steps = config.log.checkpoint_every = config.log.eval_every = 3
    assert np.isfinite(lines(train(config), 'eval')[-1]['loss'])


def test_sizes_that_do_not_divide_are_refused_before_the_folder_is_made(config):
    """24 values over 8 replicas divide, 12 do not; memories have projections of their own."""
    config.train.fsdp = True
    config.memory.value_width = 12
    with pytest.raises(Refusal, match=r'memory/output/kernel has the shape \(12, 16\), whose 12'):
        train(config)
    assert not (Path(config.workdir) / 'config.json').exists()
