"""Weights written as checkpoints so that training reads them; read without reading all."""

import numpy as np

from pkm_jax.checkpoints import arrays
from pkm_jax.checkpoints.store import newest, read_weights
from pkm_jax.models.interface import flatten


def test_training_reads_what_is_written_and_slices_are_read_alone(tmp_path, random_model):
    model = random_model(memory_layers=(1,), placement='add')
    written = {'params': model.params, 'statistics': model.statistics}
    arrays.write(tmp_path / 'checkpoints', written)
    found = arrays.open_model(newest(tmp_path))
    by_training = read_weights(newest(tmp_path))
    assert by_training.keys() == flatten(written).keys() == flatten(found).keys()
    for path, array in flatten(written).items():
        stored = flatten(found)[path]
        assert stored.shape == array.shape and stored.dtype == array.dtype
        np.testing.assert_array_equal(by_training[path], array)
        np.testing.assert_array_equal(np.asarray(stored), array)
        np.testing.assert_array_equal(stored[1:2], array[1:2])
