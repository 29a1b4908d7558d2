"""Output folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pkm_jax.refusal import Refusal


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder`, renamed to it at the end, or removed after an error.

    Raises:
      Refusal: `folder` exists; nothing is ever overwritten.
    """
    if folder.exists():
        raise Refusal(f'{folder} exists: give another name, or remove it first.')
    partial = folder.with_name(f'.{folder.name}.partial-{os.getpid()}')
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
