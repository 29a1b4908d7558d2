"""Output on consoles that are not UTF-8."""

import os
import subprocess
import sys

SCRIPT = """
from pkm_jax.console import survive_any_console
from pkm_jax.refusal import ends
survive_any_console()
print('schön …')
raise ends('Not trained: ガ')
"""


def test_what_a_console_lacks_is_written_as_its_number():
    environment = os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'}
    done = subprocess.run([sys.executable, '-c', SCRIPT], env=environment, capture_output=True)
    assert done.stdout == b'sch\\xf6n \\u2026\n' and done.stderr == b'Not trained: \\u30ac\n'
    assert done.returncode == 2
