"""The weights in a checkpoint, written and read array by array, without holding the model twice.

Checkpoints are Orbax's; store.py writes and restores whole states of training.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from pkm_jax.checkpoints import checksums
from pkm_jax.models.interface import path_of

FILE_BYTES = 2**23  # of each file: Orbax holds one in memory until it is full


class StoredArray:
    """An array that lies in a checkpoint: slices are read as they are asked for."""

    def __init__(self, checkpoint: Path, name: str):
        kvstore = {'driver': 'ocdbt', 'base': f'file://{checkpoint}/', 'path': f'{name}/'}
        self._store = ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True).result()
        self.shape, self.dtype = self._store.shape, self._store.dtype.numpy_dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._store[rows].read().result()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[...]


def write(folder: Path, model: dict) -> None:
    """Writes nested dicts of numpy arrays as step 0 of a checkpoints folder.

    `model` is {'params': …, 'statistics': …}. Orbax's copy of arrays on the host is not made.
    """
    arrays = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)))
    handler = ocp.CompositeCheckpointHandler(
        model=ocp.PyTreeCheckpointHandler(type_handler_registry=arrays))
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder / '0', args=ocp.args.Composite(
            model=ocp.args.PyTreeSave(model, ocdbt_target_data_file_size=FILE_BYTES)),
            custom_metadata=checksums.PROMISED)
    checksums.write(folder / '0')


def open_model(checkpoint: Path) -> dict:
    """{'params': …, 'statistics': …} of one finished checkpoint, nested, unread."""
    return open_item(checkpoint / 'model')


def open_item(folder: Path) -> dict:
    """The arrays of one item of a checkpoint, such as its 'model', nested, unread."""
    # A Checkpointer would warn that it misses metadata, which items have none of.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(epath.Path(folder)).tree
    return jax.tree_util.tree_map_with_path(
        lambda path, _: StoredArray(folder, path_of(path).replace('/', '.')),
        tree)
