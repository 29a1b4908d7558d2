"""The command: a BERT comes in as a run of ours and goes out again as it was."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file, save_file

from configs import bert_base_pkm
from pkm_jax import convert_checkpoint
from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.configuration import folder as run_folder
from pkm_jax.configuration.resolve import runs_of
from pkm_jax.convert import configuration, huggingface, names
from pkm_jax.convert.tensors import expected
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import flatten
from pkm_jax.training.state import initial_state

GOLDENS = Path(__file__).parent / 'convert/goldens'
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *(f'w{i}' for i in range(35))]


@pytest.fixture
def convert():
    """Runs the command with its flags as keywords."""
    def run(**settings):
        settings = {name.rstrip('_'): value for name, value in settings.items()}
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(['test', '--from=', '--to='])
        with flagsaver.as_parsed(**{name: value if isinstance(value, list) else str(value)
                                    for name, value in settings.items()}):
            convert_checkpoint.main([])
    return run


@pytest.fixture
def source(tmp_path):
    """A Hugging Face folder with a vocabulary."""
    folder = Path(shutil.copytree(GOLDENS / 'memory_added', tmp_path / 'source'))
    (folder / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
    return folder


def test_in_and_out_is_the_identity(tmp_path, source, convert, capsys):
    convert(from_=source, to=tmp_path / 'run')
    printed = capsys.readouterr().out
    assert 'layers/1/memory/values <- bert.encoder.layer.1.memory.values' in printed
    convert(from_=tmp_path / 'run', to=tmp_path / 'out')
    assert (tmp_path / 'out/vocab.txt').read_text().split('\n') == WORDS + ['']
    before, after = (huggingface.load(folder) for folder in (source, tmp_path / 'out'))
    assert before.config == after.config
    for part in ('params', 'statistics'):
        wanted, found = flatten(getattr(before, part)), flatten(getattr(after, part))
        assert wanted.keys() == found.keys()
        for path, array in wanted.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
    one, other = (load_file(folder / 'model.safetensors') for folder in (source, tmp_path / 'out'))
    assert {name: array.tobytes() for name, array in one.items()} == {
        name: array.tobytes() for name, array in other.items()}


def test_one_checkpoint_and_some_heads_go_out(tmp_path, convert, capsys):
    convert(from_=GOLDENS / 'pretraining', to=tmp_path / 'run')
    convert(from_=tmp_path / 'run/checkpoints/0', to=tmp_path / 'out', heads=['mlm'])
    assert 'left   pooler/kernel: of a head' in capsys.readouterr().out
    assert json.loads((tmp_path / 'out/config.json').read_text())['architectures'] == [
        'BertForMaskedLM']


def test_what_training_wrote_goes_out(tmp_path, convert):
    settings = bert_base_pkm.get_config()
    settings.model.update(layers=2, width=8, attention_heads=2, feed_forward_width=12, max_length=9)
    settings.memory.update(layers=(1,), sub_keys=4, heads=2, top_k=3, query_width=4)
    settings.data.update(length=9, max_predictions=2)
    settings.workdir = str(tmp_path / 'run')
    run, = runs_of(settings)
    run_folder.describe(run)
    config = run.with_vocabulary(30).model
    state = initial_state(0, config, optax.sgd(0.1), track_dead=True)
    saved = Checkpoints(tmp_path / 'run/checkpoints', keep=1)
    saved.save(state, {})
    saved.close()
    convert(from_=tmp_path / 'run', to=tmp_path / 'out')
    found = huggingface.load(tmp_path / 'out')
    assert found.config == dataclasses.replace(config, dtype='float32')
    wanted = flatten(state.params) | flatten(state.batch_stats)
    for path, array in (flatten(found.params) | flatten(found.statistics)).items():
        np.testing.assert_array_equal(array, wanted.pop(path), err_msg=path)
    assert not wanted


def test_memories_are_added(tmp_path, source, convert):
    known = {'keys': 'codebooks', 'values.weight': 'values.0',
             'query_proj.query_mlps.0.weight': 'query.weight',
             'query_proj.query_mlps.0.bias': 'query.bias'}
    weights = load_file(source / 'model.safetensors')
    foreign = {f'layers.1.{theirs}': weights[f'bert.encoder.layer.1.memory.{ours}']
               for theirs, ours in known.items()}
    save_file(foreign, tmp_path / 'memory.safetensors')
    convert(from_=GOLDENS / 'masked_lm', to=tmp_path / 'run', placement='replace', top_k=2,
            memories=tmp_path / 'memory.safetensors')
    convert(from_=tmp_path / 'run', to=tmp_path / 'out')
    found = huggingface.load(tmp_path / 'out')
    assert found.config.memory_layers == (1,) and found.config.memory.top_k == 2
    assert found.config.placement == 'replace'
    np.testing.assert_array_equal(found.params['layers'][1]['memory']['values'],
                                  foreign['layers.1.values.weight'])


@pytest.mark.parametrize('spoil, words', [
    (lambda folder: (folder / 'config.json').unlink(), 'has no config.json'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'\0' * 50), 'damaged'),
    (lambda folder: (folder / 'vocab.txt').write_text('\n'.join(WORDS + ['x'])), '41 tokens'),
])
def test_what_is_refused_leaves_no_output(tmp_path, source, convert, spoil, words):
    spoil(source)
    with pytest.raises(SystemExit, match=f'Not converted: .*{words}'):
        convert(from_=source, to=tmp_path / 'run')
    assert [path.name for path in tmp_path.iterdir()] == ['source']


@pytest.mark.parametrize('given, words', [
    (dict(heads=['mlm']), 'Leave out --heads: of no use unless a run is exported'),
    (dict(top_k=2), 'Leave out --top_k: of no use without --memories'),
    (dict(placement='add', memory_layers=['1']),
     '--memory_layers and --placement: of no use without --memories'),
])
def test_flags_that_an_import_does_not_read_are_refused(tmp_path, source, convert, given, words):
    with pytest.raises(SystemExit, match=words):
        convert(from_=source, to=tmp_path / 'run', **given)
    assert not (tmp_path / 'run').exists()


def test_flags_that_an_export_does_not_read_are_refused(tmp_path, source, convert):
    convert(from_=source, to=tmp_path / 'run')
    for name, value in dict(allow_unused=True, memories='memory.pth', memory_layers=['1'],
                            placement='replace', top_k=2).items():
        with pytest.raises(SystemExit,
                           match=f'Leave out --{name}: of no use when a run is exported'):
            convert(from_=tmp_path / 'run', to=tmp_path / 'out', **{name: value})
    assert not (tmp_path / 'out').exists()


def test_an_existing_target_is_refused(tmp_path, source, convert):
    (tmp_path / 'run').mkdir()
    with pytest.raises(SystemExit, match='run exists'):
        convert(from_=source, to=tmp_path / 'run')


@pytest.mark.slow
def test_bert_base_converts_in_time_and_in_memory(tmp_path):
    """Under 30 s and under twice its size, the interpreter and its libraries included."""
    (tmp_path / 'base').mkdir()
    rng = np.random.default_rng(0)
    config = BertConfig(vocab_size=30_522, output_heads=('mlm', 'pooler', 'nsp'))
    params, _ = expected(config)
    weights = {names.huggingface(path): rng.standard_normal(
        leaf.shape[::-1] if names.is_kernel(path) else leaf.shape, np.float32)
        for path, leaf in params.items()}
    save_file(weights, tmp_path / 'base/model.safetensors')
    (tmp_path / 'base/config.json').write_text(json.dumps(configuration.write(config, [], {})))
    size = (tmp_path / 'base/model.safetensors').stat().st_size
    assert 4.3e8 < size < 4.5e8
    for source, target in (('base', 'run'), ('run', 'out')):
        start = time.monotonic()
        peak = peak_memory(f'--from={tmp_path / source}', f'--to={tmp_path / target}')
        assert time.monotonic() - start < 30
        assert peak < 2 * size, f'{peak / size:.2f} times its size'
    back = load_file(tmp_path / 'out/model.safetensors')
    assert weights.keys() == back.keys()
    assert all(np.array_equal(back[name], array) for name, array in weights.items())


def peak_memory(*arguments: str) -> int:
    """Bytes that the command, in a process of its own, held at most."""
    program = ('import atexit, runpy\n'
               'atexit.register(lambda: print(open("/proc/self/status").read()))\n'
               'runpy.run_module("pkm_jax.convert_checkpoint", run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', program, *arguments], check=True,
                          capture_output=True, text=True)
    return 1024 * int(re.search(r'VmHWM:\s+(\d+) kB', done.stdout)[1])
