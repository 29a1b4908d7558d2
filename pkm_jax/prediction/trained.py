"""A trained model to use: weights, sizes, vocabulary, from any folder that a run can start from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pkm_jax.checkpoints import store
from pkm_jax.checkpoints.pretrained import model_of_weights, open_pretrained
from pkm_jax.configuration.resolve import task_of
from pkm_jax.data import tokenizer
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.models.interface import ModelConfig, abstract_model, flatten, unflatten
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that does not change: `graph` and `state` make its module within a program."""
    name: str
    config: ModelConfig
    vocabulary: Vocabulary
    graph: nnx.GraphDef
    state: tuple[dict, dict]        # parameters and batch statistics, nested
    task: Any                       # that it was trained on; None where that is not known

    @property
    def title(self) -> str:
        """Its run and step, or the name of its folder."""
        path = Path(self.name).absolute()
        if path.parent.name in store.FOLDERS:
            return f'{path.parents[1].name}, step {int(path.name):,}'
        return path.name


def open_trained(source: str) -> Trained:
    """The model of a run, one of its checkpoints, a converted or a Hugging Face BERT folder.

    Raises:
      Refusal: there is none, it is damaged, or it has no vocabulary beside it.
    """
    pretrained = open_pretrained(source)
    if pretrained.vocabulary is None:
        raise Refusal(f'{source} has no tokenizer.json or vocab.txt: put that of its training '
                      f'there, without which words have no numbers.')
    config = model_of_weights(pretrained.model, pretrained.weights)
    abstract = abstract_model(config)
    state = (_filled(source, pretrained, 'params', nnx.state(abstract, nnx.Param)),
             _filled(source, pretrained, 'statistics', nnx.state(abstract, nnx.BatchStat)))
    vocabulary = tokenizer.load(pretrained.vocabulary)
    graph = nnx.split(abstract, nnx.Param, nnx.BatchStat)[0]
    task = task_of(pretrained.described) if 'data' in pretrained.described else None
    return Trained(pretrained.name, config, vocabulary, graph, state, task)


def _filled(source, pretrained, kind, abstract):
    """The weights of an abstract state, nested, on the device."""
    wanted = flatten(nnx.to_pure_dict(abstract))
    if missing := [path for path in wanted if f'{kind}/{path}' not in pretrained.weights]:
        raise Refusal(f'{source} lacks {", ".join(missing[:5])}, which its config.json asks for.')
    arrays = {path: np.asarray(pretrained.weights[f'{kind}/{path}'], leaf.dtype)
              for path, leaf in wanted.items()}
    return unflatten(jax.tree.map(jnp.asarray, arrays))
