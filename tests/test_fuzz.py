"""Every reader of files of others reads or refuses a few hundred that nobody wrote; see fuzz.py."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import Watched
from tests.fuzz_readers import damaged, readers

ROOT = Path(__file__).parents[1]


def run(*words):
    return subprocess.run([sys.executable, '-m', 'tests.fuzz', *words], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})


def test_readers_read_or_refuse(tmp_path):
    done = run('--inputs', '1450', '--keep', str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(' 0 findings') == len(readers()) >= 29


def test_what_a_reader_must_not_do_is_noticed(tmp_path):
    for own, noticed in ((None, ['open', 'os.rename', 'os.remove']), (tmp_path, ['os.remove']),
                         (tmp_path / 'other', ['open', 'os.rename', 'os.remove'])):
        with Watched(own) as watched:
            (tmp_path / 'a').write_text('written')
            (tmp_path / 'a').rename(tmp_path / 'b')
            os.remove(tmp_path / 'b')
        assert [seen.split()[0] for seen in watched.seen] == noticed
    with pytest.raises(TimeoutError), pytest.MonkeyPatch.context() as patch:
        patch.setattr('tests.fuzz.SECONDS', .1)
        with Watched():
            while True:
                pass


def test_inputs_differ_and_can_be_made_again():
    made = [damaged(Random(f'txt {number}'), b'some text of a file') for number in range(50)]
    assert len(set(made)) > 40
    assert made == [damaged(Random(f'txt {n}'), b'some text of a file') for n in range(50)]
