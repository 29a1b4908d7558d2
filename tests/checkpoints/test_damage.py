"""Whatever happens to a file of a checkpoint is found, named, and not trained on."""

import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pkm_jax.checkpoints import arrays, checksums, store
from pkm_jax.checkpoints.store import Checkpoints
from pkm_jax.memory.layer import MemoryConfig
from pkm_jax.models.bert import BertConfig
from pkm_jax.models.interface import table_paths
from pkm_jax.optimizers.build import OptimizerConfig, make_optimizer
from pkm_jax.refusal import Refusal
from pkm_jax.training.state import initial_state

MODEL = BertConfig(
    vocab_size=30, layers=2, width=8, attention_heads=2, feed_forward_width=12, max_length=9,
    memory=MemoryConfig(sub_keys=4, heads=2, top_k=3, query_width=4), memory_layers=(1,),
    placement='add')
PROGRESS = {'data': {'batches': 1234, 'fingerprint': 'abc'}, 'log': {'lines': 3}}


class Tiny(NamedTuple):
    """A state that is quick to write."""
    step: Any
    params: Any
    batch_stats: Any
    optimizer: Any


def tiny(step):
    return Tiny(jnp.int32(step), {'table': jnp.full((64, 8), step, jnp.float32)},
                {'mean': jnp.ones(4)}, [jnp.zeros(3)])


def written(folder, *states, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for state in states:
        checkpoints.save(state, PROGRESS)
    checkpoints.close()


def found(folder):
    """What a resumed run finds: (step, state) or None."""
    checkpoints = Checkpoints(folder, 3)
    try:
        newest = checkpoints.newest()
        return newest and (newest[0], checkpoints.restore(newest[0], jax.eval_shape(tiny, 0)))
    finally:
        checkpoints.close()


@pytest.fixture(scope='module', params=[False, True], ids=['dense', 'sparse'])
def checkpoint(request, tmp_path_factory):
    """One of a whole training state."""
    optimizer = make_optimizer(OptimizerConfig(), 100, table_paths(MODEL.memories),
                               MODEL.is_backbone, sparse=request.param)
    state = jax.jit(lambda: initial_state(0, MODEL, optimizer, track_dead=True))()
    folder = tmp_path_factory.mktemp('run')
    written(folder, state)
    return folder / '0'


def flipped(content, random):
    """One bit of it, anywhere."""
    changed = bytearray(content)
    changed[random.integers(len(content))] ^= 1 << random.integers(8)
    return bytes(changed)


FAULTS = {
    'a bit flipped': flipped,
    'half of it': lambda content, random: content[:len(content) // 2],
    'emptied': lambda content, random: b'',
    'longer': lambda content, random: content + b'\0',
    'deleted': lambda content, random: None}


@pytest.mark.parametrize('fault', FAULTS)
def test_whatever_happens_to_any_file_is_found_and_names_it(checkpoint, fault):
    random = np.random.default_rng(0)
    files = [path for path in sorted(checkpoint.rglob('*')) if path.is_file()]
    assert len(files) > 20 and not checksums.damage(checkpoint)
    for path in files:
        content = path.read_bytes()
        for _ in range(8 if fault == 'a bit flipped' else 1):
            changed = FAULTS[fault](content, random)
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
            faults = checksums.damage(checkpoint)
            path.write_bytes(content)
            name = str(path.relative_to(checkpoint))
            assert len(faults) == 1 and faults[0].startswith(name), (name, faults)
    assert not checksums.damage(checkpoint)


def test_damaged_ones_are_set_aside_and_the_one_before_is_read(tmp_path, caplog):
    written(tmp_path, tiny(1), tiny(2), tiny(3))
    for step in (2, 3):
        path = tmp_path / str(step) / 'progress' / 'metadata'
        path.write_bytes(path.read_bytes().replace(b'1234', b'1235'))
    step, state = found(tmp_path)
    assert step == 1 and float(state.params['table'].max()) == 1
    assert f'{tmp_path}/3 is damaged: progress/metadata is not what was written' in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1', 'damaged-2', 'damaged-3']
    written(tmp_path, tiny(3))
    shutil.rmtree(tmp_path / '3' / 'model')
    assert found(tmp_path)[0] == 1 and (tmp_path / 'damaged-3-2').exists()


def test_where_none_is_whole_each_is_named_and_nothing_begins_anew(tmp_path):
    written(tmp_path, tiny(1), tiny(2))
    (tmp_path / '1' / checksums.CHECKSUMS).unlink()
    (tmp_path / '2' / 'rest' / '_METADATA').write_text('')
    with pytest.raises(Refusal, match='does not begin anew') as refusal:
        found(tmp_path)
    assert f'{tmp_path}/1: checksums.json is missing' in str(refusal.value)
    assert f'{tmp_path}/2: rest/_METADATA has 0 bytes' in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']
    shutil.rmtree(tmp_path / '1')
    (tmp_path / '2').rename(tmp_path / 'damaged-2')
    with pytest.raises(Refusal, match='damaged-2'):
        found(tmp_path)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert found(tmp_path) is None


@pytest.mark.parametrize('error', [MemoryError(), ValueError('another shape')])
def test_other_errors_are_shown_and_rename_nothing(tmp_path, monkeypatch, error):
    written(tmp_path, tiny(1), tiny(2))
    monkeypatch.setattr(Checkpoints, '_read', lambda self, step, **items: raised(error))
    with pytest.raises(type(error)):
        found(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


def raised(error):
    raise error


def test_a_changed_model_is_no_damage(tmp_path):
    written(tmp_path, tiny(1))
    checkpoints = Checkpoints(tmp_path, 3)
    like = jax.eval_shape(tiny, 0)
    with pytest.raises(ValueError) as error:
        checkpoints.restore(1, like._replace(params={'other': like.params['table']}))
    checkpoints.close()
    assert 'nothing was renamed' in error.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_a_passing_fault_of_the_storage_is_no_damage(tmp_path, monkeypatch):
    written(tmp_path, tiny(1), tiny(2))
    real = checksums._hash

    def hash_of(file):
        if 'rest' in file.name:
            raise OSError(5, 'Input/output error')
        return real(file)

    monkeypatch.setattr(checksums, '_hash', hash_of)
    with pytest.raises(Refusal, match='cannot be read: rest/.*Input/output error'):
        found(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2']


def as_an_earlier_version_wrote_it(checkpoint):
    (checkpoint / checksums.CHECKSUMS).unlink()
    path = checkpoint / checksums.METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | {'custom_metadata': {}}))


def test_those_of_before_are_read_with_a_word(tmp_path, caplog):
    written(tmp_path, tiny(1))
    as_an_earlier_version_wrote_it(tmp_path / '1')
    assert store.newest(tmp_path) == tmp_path / '1'
    assert found(tmp_path)[0] == 1
    assert f'{tmp_path}/1 has no checksums' in caplog.text


def test_one_without_checksums_and_with_damaged_metadata_is_not_one_of_before(tmp_path):
    written(tmp_path, tiny(1))
    as_an_earlier_version_wrote_it(tmp_path / '1')
    (tmp_path / '1' / checksums.METADATA).write_text('{"item')
    assert checksums.damage(tmp_path / '1') == ['checksums.json is missing']


def test_one_that_was_not_finished_is_not_taken_for_one_of_before(tmp_path, caplog):
    """Its checksums were lost."""
    written(tmp_path, tiny(1), tiny(2))
    (tmp_path / '2' / checksums.CHECKSUMS).unlink()
    assert store.newest(tmp_path) == tmp_path / '1'
    assert f'{tmp_path}/2 was never finished' in caplog.text
    assert found(tmp_path)[0] == 1


def test_old_ones_are_deleted_once_the_new_one_is_finished(tmp_path, monkeypatch):
    written(tmp_path, tiny(1), tiny(2), tiny(3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3']
    monkeypatch.setattr(checksums, 'write', lambda checkpoint: raised(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, tiny(4), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3', '4.unfinished']
    assert found(tmp_path)[0] == 3


def test_what_a_killed_process_left_is_cleared(tmp_path):
    written(tmp_path, tiny(1))
    for name in ('2.orbax-checkpoint-tmp', '2.unfinished', '0.deleted'):
        shutil.copytree(tmp_path / '1', tmp_path / name)
    assert found(tmp_path)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_weights_to_start_from_are_verified(tmp_path):
    arrays.write(tmp_path / 'checkpoints', {'params': {'a': np.arange(2000.)}, 'statistics': {}})
    whole = store.whole(store.of_run(tmp_path))
    path = max((path for path in whole.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(flipped(path.read_bytes(), np.random.default_rng(0)))
    with pytest.raises(Refusal, match=f'{path.relative_to(whole)} is not what was written'):
        store.whole(store.of_run(tmp_path))
    assert whole.exists()
