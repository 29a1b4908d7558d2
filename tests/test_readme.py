"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / 'README.md'


def test_the_blocks_of_your_own_model_run_one_after_the_other(capsys):
    section = README.read_text().split('## Put it into your own model')[1].split('\n## ')[0]
    blocks = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(compile(block, str(README), 'exec'), names)
    assert names['y'].shape == (2, 16, 128)
    assert 0 < float(capsys.readouterr().out.split()[-1]) < 1
    touched = int(names['touched'].count[0])
    assert 0 < touched < 64 ** 2 and len(names['rows']) >= touched
