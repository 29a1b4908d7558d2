"""Original TensorFlow BERT checkpoints (google-research/bert) to our parameters.

A folder holds `bert_config.json` (or `config.json`), `vocab.txt` and one checkpoint, usually
`bert_model.ckpt.*`. TensorFlow's own reader reads it: `pip install 'pkm_jax[tensorflow]'`.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pkm_jax.convert import configuration, names
from pkm_jax.convert.tensors import ForeignModel, StoredTensor, assemble
from pkm_jax.data.files import refuse_pointer
from pkm_jax.refusal import Refusal

OPTIMIZER = re.compile(r'global_step|.*/(adam_m|adam_v)')
# Heads that are stored the other way round: [outputs, width].
TRANSPOSED = ('nsp/kernel', 'classifier/kernel', 'span/kernel')


def load(folder: str | Path, allow_unused: bool = False) -> ForeignModel:
    """The model in a folder of google-research/bert, with those heads whose weights it holds.

    The state of its optimizer is left.
    Raises:
      Refusal: TensorFlow is not installed; the folder lacks its configuration or a checkpoint, or
        holds several; the checkpoint is damaged; a tensor is missing, has another
        shape or a name that is not understood (these are left with `allow_unused`).
    """
    folder = Path(folder)
    files = [folder / name for name in ('bert_config.json', 'config.json')]
    config = configuration.read(next(filter(Path.is_file, files), files[0]))
    found = open_tensors(_checkpoint(folder))
    stored = {name: tensor for name, tensor in found.items() if not OPTIMIZER.fullmatch(name)}
    left = {name: "the optimizer's" for name in found if name not in stored}
    config = configuration.with_heads(config, stored, names.tensorflow)
    return assemble(config, stored, names.tensorflow, TRANSPOSED.__contains__, left, allow_unused)


def find_checkpoints(folder: Path) -> list[Path]:
    """NAME of every NAME.index with a NAME.data-… beside it."""
    return [index.with_suffix('') for index in sorted(folder.glob('*.index'))
            if any(path.name.startswith(f'{index.stem}.data-') for path in folder.iterdir())]


def _checkpoint(folder: Path) -> Path:
    found = find_checkpoints(folder)
    if not found:
        raise Refusal(f'{folder} has no TensorFlow checkpoint (NAME.index beside '
                      f'NAME.data-00000-of-00001).')
    if len(found) > 1:
        raise Refusal(f'{folder} holds {len(found)} checkpoints, {[path.name for path in found]}: '
                      f'leave one there.')
    refuse_pointer(found[0].with_name(f'{found[0].name}.index'))
    return found[0]


def open_tensors(prefix: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint PREFIX.index, PREFIX.data-…, read when they are asked for.

    Raises:
      Refusal: TensorFlow is not installed; the checkpoint is damaged, now or when one is read.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise Refusal(f"{prefix} is a TensorFlow checkpoint: to read it, pip install "
                      f"'pkm_jax[tensorflow]'.") from error
    with _refused(prefix, tf.errors.OpError):
        reader = tf.train.load_checkpoint(str(prefix))
        dtypes = {name: np.dtype(dtype.as_numpy_dtype)
                  for name, dtype in reader.get_variable_to_dtype_map().items()}
        shapes = reader.get_variable_to_shape_map()

    def read(name):
        with _refused(prefix, tf.errors.OpError):
            return reader.get_tensor(name)

    return {name: StoredTensor(tuple(shape), dtypes[name], functools.partial(read, name))
            for name, shape in shapes.items()}


@contextlib.contextmanager
def _refused(prefix: Path, kind: type[Exception]) -> Iterator[None]:
    """Refuses a checkpoint at which TensorFlow raises its `kind` of errors, or those of Python that
    it makes of them."""
    try:
        yield
    except (kind, ValueError, IndexError, RuntimeError, MemoryError) as error:
        raise Refusal(f'{prefix} cannot be read as a TensorFlow checkpoint ({error}): copy it '
                      f'again, with its .data files.') from error
