"""The README's Python runs as it stands, and it is short."""

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[1] / 'README.md'


def test_it_is_short_and_all_of_its_python_is_run_below():
    text = README.read_text()
    section = text.split('## Put it into your own model')[1].split('\n## ')[0]
    assert len(text.splitlines()) <= 200
    assert text.count('```python') == section.count('```python') == 3


def test_the_blocks_of_your_own_model_run_one_after_the_other(capsys):
    section = README.read_text().split('## Put it into your own model')[1].split('\n## ')[0]
    blocks = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
    assert all(sum(bool(line) for line in block.splitlines()) <= 10 for block in blocks)
    own_model, slots_that_fired, sparsely = (
        compile(block, str(README), 'exec') for block in blocks)
    names = {}

    exec(own_model, names)
    memory = names['block'].memory
    assert names['y'].shape == (2, 16, 128) and np.any(memory.query_norm.mean[...])

    exec(slots_that_fired, names)
    *fired, usage = capsys.readouterr().out.split()
    assert re.findall(r'\d+', ' '.join(fired))[:8] == [
        str(slot) for slot in names['reads'].slots[0, 0]]
    assert float(usage) == len(np.unique(names['reads'].slots)) / 64 ** 2

    before = np.array(memory.values[...])
    exec(sparsely, names)
    changed = np.flatnonzero(np.any(np.asarray(memory.values[...]) != before, axis=1))
    touched = np.asarray(names['touched'].ids)[:int(names['touched'].count[0])]
    assert 0 < len(touched) < 64 ** 2
    np.testing.assert_array_equal(changed, touched)
