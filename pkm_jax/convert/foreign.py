"""A folder with somebody's BERT, of whichever kind it is."""

from pathlib import Path

from pkm_jax.convert import huggingface, tensorflow
from pkm_jax.convert.tensors import ForeignModel
from pkm_jax.convert.weights import find_weights


def load(folder: str | Path, allow_unused: bool = False) -> ForeignModel:
    """The model in a folder: from PyTorch's or safetensors' weights, else TensorFlow's.

    Raises:
      Refusal: as `huggingface.load` and `tensorflow.load` do.
    """
    folder = Path(folder)
    other = not find_weights(folder) and tensorflow.find_checkpoints(folder)
    return (tensorflow if other else huggingface).load(folder, allow_unused)
