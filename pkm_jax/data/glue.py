"""The nine tasks of GLUE (Wang et al. 2019, arXiv:1804.07461) in the files that it distributes.

All are tables of tabs in which quotes are characters like others. What is labelled how, and in
which order, is fixed by what GLUE's server takes and by what models are published with.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pkm_jax.data.columns import Texts, texts_of
from pkm_jax.data.files import expand
from pkm_jax.data.tables import Row, read_tsv
from pkm_jax.refusal import Refusal


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """Where a task's files are, what its columns are called, how its labels are written.

    `labels`: {as written: name}, in the order of the outputs; {} for numbers. `measures`: those
    whose mean is the task's score. `fields`: what published datasets call the text columns, where
    they rename them.
    """
    folder: str
    text: str
    second: str
    label: str
    labels: dict[str, str]
    measures: tuple[str, ...] = ('accuracy',)
    header: tuple[str, ...] | None = None   # of training and validation files without one
    damaged: bool = False                   # rows with too few tabs are in the official file
    validation: tuple[str, ...] = ('dev',)  # names of files, the first being 'validation'
    test: tuple[str, ...] = ('test',)
    fields: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the texts: one or two."""
        return tuple(name for name in (self.text, self.second) if name)


_ENTAILED = {'entailment': 'entailment', 'not_entailment': 'not_entailment'}
TASKS = {
    'cola': GlueTask('CoLA', 'sentence', '', 'label', {'0': 'unacceptable', '1': 'acceptable'},
                     ('matthews_correlation',), header=('source', 'label', 'star', 'sentence')),
    'sst2': GlueTask('SST-2', 'sentence', '', 'label', {'0': 'negative', '1': 'positive'}),
    'mrpc': GlueTask('MRPC', '#1 String', '#2 String', 'Quality',
                     {'0': 'not_equivalent', '1': 'equivalent'}, ('accuracy', 'f1'),
                     fields=('sentence1', 'sentence2')),
    'stsb': GlueTask('STS-B', 'sentence1', 'sentence2', 'score', {}, ('pearson', 'spearmanr')),
    'qqp': GlueTask('QQP', 'question1', 'question2', 'is_duplicate',
                    {'0': 'not_duplicate', '1': 'duplicate'}, ('accuracy', 'f1'), damaged=True),
    'mnli': GlueTask('MNLI', 'sentence1', 'sentence2', 'gold_label',
                     {name: name for name in ('entailment', 'neutral', 'contradiction')},
                     validation=('dev_matched', 'dev_mismatched'),
                     test=('test_matched', 'test_mismatched'), fields=('premise', 'hypothesis')),
    'qnli': GlueTask('QNLI', 'question', 'sentence', 'label', _ENTAILED),
    'rte': GlueTask('RTE', 'sentence1', 'sentence2', 'label', _ENTAILED),
    'wnli': GlueTask('WNLI', 'sentence1', 'sentence2', 'label',
                     {'0': 'not_entailment', '1': 'entailment'}),
}
# The diagnostics: pairs without labels for a model of MNLI, by where they have been distributed.
DIAGNOSTICS = ('AX/diagnostic.tsv', 'diagnostic/diagnostic.tsv', 'AX/AX.tsv')
SECOND = '_mm'              # of splits with MNLI's mismatched genres
AX = 'test_ax'


def read_glue(folder: str, name: str, log: Callable[[str], None]) -> dict[str, Texts]:
    """The splits 'train', 'validation' and, where their files are there, 'test'; of MNLI also
    'validation_mm', 'test_mm' and 'test_ax'. Labels have their names.

    Raises:
      Refusal: a file is missing, or a row is not what the task's are; it is named with the line.
    """
    task, root = TASKS[name], Path(expand(folder))
    files = {'train': 'train'}
    for split, names in (('validation', task.validation), ('test', task.test)):
        files |= dict(zip((split, split + SECOND), names))
    found = {}
    for split, stem in files.items():
        path = root / task.folder / f'{stem}.tsv'
        if path.exists():
            found[split] = _texts(task, str(path), split.startswith('test'), log)
        elif not split.startswith('test'):
            folders = ', '.join(one.folder for one in TASKS.values())
            raise Refusal(f'{path} is missing: data.folder = {folder!r} must hold the folders of '
                          f'the official download, {folders}, or what pkm_glue prepared of it.')
    diagnostics = read_diagnostics(folder, log) if name == 'mnli' else None
    return found | ({AX: diagnostics} if diagnostics else {})


def read_diagnostics(folder: str, log: Callable[[str], None]) -> Texts | None:
    """The diagnostics AX, without labels; None where there are none.

    Raises:
      Refusal: a row is not what theirs are; it is named with the line.
    """
    paths = [Path(expand(folder)) / path for path in DIAGNOSTICS]
    return next((_texts(TASKS['mnli'], str(path), True, log) for path in paths if path.exists()),
                None)


def submission(name: str, split: str) -> str:
    """The file name under which GLUE's server expects the predictions of a test split."""
    if split == AX:
        return 'AX.tsv'
    part = {'test': '-m', 'test' + SECOND: '-mm'}[split] if name == 'mnli' else ''
    return f'{TASKS[name].folder}{part}.tsv'


def _texts(task: GlueTask, path: str, is_test: bool, log: Callable[[str], None]) -> Texts:
    skipped: list[str] | None = [] if task.damaged and not is_test else None
    rows = list(read_tsv(path, None if is_test else task.header, skipped))
    if not rows:
        raise Refusal(f'{path} holds no rows.')
    if skipped:
        log(f'data: {len(skipped):,} rows with another number of tabs are left out, as GLUE does; '
            f'the first is {skipped[0]}')
    for column in [*task.columns, *([] if is_test else [task.label])]:
        if column not in rows[0].values:
            raise Refusal(f'{path} has no column {column!r}, only '
                          f'{", ".join(map(repr, rows[0].values))}: it is not the official file.')
    if is_test:
        return texts_of(rows, task.text, task.second, '')
    return texts_of([_named(task, row) for row in rows] if task.labels else rows,
                    task.text, task.second, task.label)


def _named(task: GlueTask, row: Row) -> Row:
    """The row with its label by name.

    Raises:
      Refusal: it is none of the task's.
    """
    written = row.values[task.label]
    if written not in task.labels:
        raise Refusal(f'{row.place}: the label {written!r} is none of '
                      f'{", ".join(map(repr, task.labels))}: the file is not the official one.')
    return Row(row.values | {task.label: task.labels[written]}, row.place)
