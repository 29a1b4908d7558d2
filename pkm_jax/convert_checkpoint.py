r"""Converts BERT weights in and out: python -m pkm_jax.convert_checkpoint --from=FOLDER --to=FOLDER

    python -m pkm_jax.convert_checkpoint --from=bert-base-uncased --to=runs/bert_base
    python -m pkm_jax.convert_checkpoint --from=bert-base-uncased --to=runs/with_memories \
        --memories=xlm.pth --placement=replace
    python -m pkm_jax.convert_checkpoint --from=runs/bert_base_pkm --to=exported

`--from` is a Hugging Face folder, a folder with an original TensorFlow checkpoint, one of our runs
or one checkpoint of it; runs become Hugging Face folders. Nothing is downloaded. What became of
every tensor is printed. `--to` appears whole or not at all.

Guide: docs/weights.md.
"""

import dataclasses
import json
from pathlib import Path

from absl import app, flags, logging

from pkm_jax.checkpoints import arrays, store
from pkm_jax.checkpoints.pretrained import model_of_weights
from pkm_jax.configuration import command_line
from pkm_jax.configuration.folder import read_description
from pkm_jax.configuration.resolve import described_model, model_of
from pkm_jax.console import survive_any_console
from pkm_jax.convert import foreign, huggingface, labels, memories
from pkm_jax.convert.folders import appearing
from pkm_jax.convert.tensors import ConversionLog, ForeignModel
from pkm_jax.data import tokenizer
from pkm_jax.data.files import expand
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.models.bert import HEADS, BertConfig
from pkm_jax.models.interface import flatten
from pkm_jax.refusal import Refusal, ends
from pkm_jax.training.metrics_file import evaluation_of

FROM = flags.DEFINE_string('from', None, 'Folder to convert.', required=True)
TO = flags.DEFINE_string('to', None, 'Folder to write; must not exist.', required=True)
ALLOW_UNUSED = flags.DEFINE_bool('allow_unused', False, 'Leave tensors of unknown names.')
HEADS_KEPT = flags.DEFINE_list('heads', None, f'Heads to export, of {HEADS}; all by default.')
MEMORIES = flags.DEFINE_string('memories', None, 'State dict with product-key memories to add.')
MEMORY_LAYERS = flags.DEFINE_list('memory_layers', [], 'Layers of these memories, from 0, in the '
                                  'order of the file; by default the numbers in their names.')
PLACEMENT = flags.DEFINE_enum('placement', 'add', ['add', 'replace'], 'Of these memories.')
TOP_K = flags.DEFINE_integer('top_k', BertConfig.memory.top_k, 'Slots they read per head.')
OF_MEMORIES = (MEMORY_LAYERS, PLACEMENT, TOP_K)


def main(argv: list[str]) -> None:
    del argv
    survive_any_console()
    source, target = Path(expand(FROM.value)), Path(expand(TO.value))
    try:
        if (source / 'checkpoints').is_dir() or source.parent.name in store.FOLDERS:
            _refuse('when a run is exported', ALLOW_UNUSED, MEMORIES, *OF_MEMORIES)
            log = export(source, target)
        else:
            _refuse('unless a run is exported', HEADS_KEPT)
            if not MEMORIES.value:
                _refuse('without --memories', *OF_MEMORIES)
            pretrained = read(source)
            write_run(target, pretrained, source)
            log = pretrained.log
    except (Refusal, OSError) as error:
        raise ends(f'Not converted: {error}') from error
    print(log)


def _refuse(when: str, *without_meaning: flags.FlagHolder) -> None:
    """Refuses those of these flags that were given: they would do nothing."""
    if given := [f'--{flag.name}' for flag in without_meaning if flag.present]:
        raise Refusal(f'Leave out {" and ".join(given)}: of no use {when}.')


def read(folder: Path) -> ForeignModel:
    """A Hugging Face or TensorFlow folder, with the memories of `--memories` if given."""
    pretrained = foreign.load(folder, ALLOW_UNUSED.value)
    if MEMORIES.value:
        if not all(layer.strip().isdecimal() for layer in MEMORY_LAYERS.value):
            raise Refusal(f'--memory_layers = {MEMORY_LAYERS.value}: numbers with "," between.')
        layers = [int(layer) for layer in MEMORY_LAYERS.value]
        pretrained = memories.add_memories(pretrained, Path(expand(MEMORIES.value)),
                                           PLACEMENT.value, TOP_K.value, layers)
    return pretrained


def write_run(folder: Path, pretrained: ForeignModel, source: Path) -> None:
    """A run of ours at step 0, for `--config.init_from`: config.json, vocab.txt, a checkpoint."""
    vocabulary = _vocabulary(source)
    if vocabulary and len(vocabulary.tokens) > pretrained.config.vocab_size:
        raise Refusal(f'The vocabulary in {source} has {len(vocabulary.tokens)} tokens, the '
                      f'model {pretrained.config.vocab_size}.')
    with appearing(folder) as partial:
        described = described_model(pretrained.config)
        del described['model']['vocab_size']    # that of the embedding
        described |= labels.of_run(source, pretrained.config)
        (partial / 'config.json').write_text(
            json.dumps(described, indent=1) + '\n')
        if vocabulary:
            vocabulary.save(partial)
        arrays.write(partial.absolute() / 'checkpoints', {
            'params': pretrained.params, 'statistics': pretrained.statistics})


def export(source: Path, target: Path) -> ConversionLog:
    """The newest checkpoint of a run, or one of its checkpoints, as a Hugging Face folder."""
    run = source if (source / 'checkpoints').is_dir() else source.parent.parent
    checkpoint = store.whole(store.of_run(source))
    model = arrays.open_model(checkpoint)
    params = model['params']
    described = read_description(run)
    config = model_of_weights(model_of(described), flatten(model))
    if HEADS_KEPT.value:
        config = dataclasses.replace(config, output_heads=tuple(HEADS_KEPT.value))
    return huggingface.save(target, config, params, model.get('statistics') or {},
                            vocabulary=_vocabulary(run), run=described,
                            evaluation=evaluation_of(run, int(checkpoint.name)))


def _vocabulary(folder: Path) -> Vocabulary | None:
    if tokenizer.find(folder) is None:
        logging.warning('%s has no vocabulary: none is written.', folder)
        return None
    return tokenizer.load(folder, log=print)


if __name__ == '__main__':
    app.run(main, flags_parser=command_line.parsed)
