"""GLUE's tasks as datasets of TFDS, prepared from the official files without TensorFlow.

    import tensorflow_datasets as tfds
    from pkm_jax.data import glue_builder       # makes 'pkm_glue' known to TFDS

    builder = tfds.builder('pkm_glue/sst2', data_dir='data')
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir='glue'))
    builder.as_data_source('train')[0]          # {'idx': 0, 'label': 1, 'sentence': b'…'}

Configurations, splits and features are called as by TFDS's own 'glue', which downloads what it
prepares. What is read is what `glue.read_glue` reads, in the order of the files.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from pkm_jax.data.columns import Texts
from pkm_jax.data.files import expand
from pkm_jax.data.glue import AX, SECOND, TASKS, GlueTask, read_diagnostics, read_glue
from pkm_jax.data.tfds_text import open_builder, random_access
from pkm_jax.refusal import Refusal

DIAGNOSTICS = 'ax'      # a configuration of its own: pairs as MNLI's
UNKNOWN = -1            # the label of a test split


class PkmGlue(tfds.core.GeneratorBasedBuilder):
    """The nine tasks and the diagnostics; `manual_dir` is the folder that CoLA, SST-2, … are in.

    Raises (when it is prepared):
      Refusal: a file is missing, or not the official one; it is named with the line.
    """
    code_path = None    # of checksums of downloads; to look for it TFDS needs another package
    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = 'The unpacked official download of GLUE: CoLA, SST-2, …'
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name)
                                 for name in (*TASKS, DIAGNOSTICS)]

    def __init__(self, *, file_format: Any = 'array_record', **options: Any):
        # TFDS's own choice is a format that TensorFlow alone reads.
        super().__init__(file_format=file_format, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        task = task_of(self.builder_config.name)
        label = (tfds.features.ClassLabel(names=list(task.labels.values())) if task.labels else
                 tfds.features.Scalar(np.float32))
        return tfds.core.DatasetInfo(
            builder=self, disable_shuffling=True, homepage='https://gluebenchmark.com',
            features=tfds.features.FeaturesDict({
                **{name: tfds.features.Text() for name in fields_of(task)},
                'label': label, 'idx': tfds.features.Scalar(np.int32)}))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        name, folder = self.builder_config.name, str(dl_manager.manual_dir)
        if name == DIAGNOSTICS:
            diagnostics = read_diagnostics(folder, print)
            if diagnostics is None:
                raise Refusal(f'{folder} has no diagnostics: AX/diagnostic.tsv is missing.')
            found = {AX: diagnostics}
        else:
            found = read_glue(folder, name, print)
        return {split: self._generate_examples(found[ours])
                for split, ours in splits_of(name).items() if ours in found}

    def _generate_examples(self, texts: Texts) -> Iterator[tuple[int, dict[str, Any]]]:
        fields = fields_of(task_of(self.builder_config.name))
        for number, some in enumerate(zip(*filter(None, (texts.texts, texts.seconds)))):
            label = UNKNOWN if texts.labels is None else texts.labels[number]
            yield number, {**dict(zip(fields, some)), 'label': label, 'idx': number}


def task_of(config: str) -> GlueTask:
    """The task of a configuration: of the diagnostics MNLI."""
    return TASKS['mnli' if config == DIAGNOSTICS else config]


def fields_of(task: GlueTask) -> tuple[str, ...]:
    """The features of a task's texts."""
    return task.fields or task.columns


def splits_of(config: str) -> dict[str, str]:
    """What a configuration's splits are called here, by their names in TFDS."""
    if config == DIAGNOSTICS:
        return {'test': AX}
    if config != 'mnli':
        return {name: name for name in ('train', 'validation', 'test')}
    return {'train': 'train', **{f'{kind}_{part}': kind + ours for kind in ('validation', 'test')
                                 for part, ours in (('matched', ''), ('mismatched', SECOND))}}


def read_prepared(
    folder: str, name: str, log: Callable[[str], None],
) -> dict[str, Texts] | None:
    """What `read_glue` reads, of what TFDS prepared with `folder` as data_dir; None where this task
    is not there (the diagnostics alone are no task).

    Raises:
      Refusal: its description is damaged, or its files are not ArrayRecord.
    """
    paths = {config: Path(expand(folder), 'pkm_glue', config, str(PkmGlue.VERSION))
             for config in (name, *([DIAGNOSTICS] if name == 'mnli' else []))}
    if not paths[name].is_dir():
        return None
    log(f'data: {name} as TFDS prepared it in {paths[name]}')
    found = {}
    for config, path in paths.items():
        if path.is_dir():
            builder = open_builder(path)
            if not random_access(builder):
                raise Refusal(f"{path} holds {builder.info.file_format.value} files: prepare it "
                              "again with tfds.builder(…, file_format='array_record').")
            found |= {ours: _texts(builder, config, split)
                      for split, ours in splits_of(config).items() if split in builder.info.splits}
    return found


def _texts(builder: tfds.core.DatasetBuilder, config: str, split: str) -> Texts:
    task, source = task_of(config), builder.as_data_source(split)
    examples = source.__getitems__(range(len(source)))
    texts = [[example[field].decode() for example in examples] for field in fields_of(task)]
    places = [f'{builder.data_dir}, {split}, example {number + 1}' for number in range(len(source))]
    labels = [example['label'] for example in examples]
    if task.labels:
        names = list(task.labels.values())
        labels = [names[label] for label in labels]
    return Texts(texts[0], texts[1] if task.second else None,
                 None if split.startswith('test') else labels, places)
