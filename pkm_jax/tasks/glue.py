"""The tasks of GLUE: classifications whose files, labels, scores and submissions it names."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pkm_jax.data import glue
from pkm_jax.data.columns import Texts
from pkm_jax.data.glue_builder import read_prepared
from pkm_jax.data.labelled import Labelled
from pkm_jax.fields import setting
from pkm_jax.tasks import scores
from pkm_jax.tasks.classification import TextClassification
from pkm_jax.tasks.finetuning import in_order

MOST_SIMILAR = 5.   # of STS-B, whose scores begin at 0


@dataclasses.dataclass(frozen=True)
class Glue(TextClassification):
    """A task of GLUE, in the files of its official download.

    Raises:
      Refusal: a value is out of its range.
    """
    name: str = setting('mrpc', 'the task', choices=tuple(glue.TASKS))
    folder: str = setting('glue', 'the unpacked download, with the folders CoLA, SST-2, …; or the '
                                  'data_dir in which TFDS prepared pkm_glue')

    @property
    def _task(self):
        return glue.TASKS[self.name]

    @property
    def problem(self) -> str:
        """'regression' of STS-B."""
        return 'single_label' if self._task.labels else 'regression'

    @property
    def text(self) -> str:
        """The column of the text."""
        return self._task.text

    @property
    def text_pair(self) -> str:
        """The column of the second text of a pair, or ''."""
        return self._task.second

    @property
    def metric(self) -> str:    # type: ignore[override]
        """By which the best weights are chosen: the mean where GLUE names two."""
        return self._task.measures[0] if len(self._task.measures) == 1 else 'combined_score'

    def read(self, log: Callable[[str], None]) -> dict[str, Texts]:
        """The task's splits; see `glue.read_glue`."""
        return (read_prepared(self.folder, self.name, log)
                or glue.read_glue(self.folder, self.name, log))

    def names(self, found: dict[str, Any]) -> tuple[str, ...]:
        """Those that GLUE gives, in its order."""
        return self.labels or tuple(self._task.labels.values())

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Labelled, split: str,
    ) -> dict[str, float]:
        """Scores as of any classification, and the mean of the task's where it has two."""
        values = super().evaluation(sums, outputs, data, split)
        if values and len(self._task.measures) > 1:
            values['combined_score'] = scores.combined(values, self._task.measures)
        return values

    def score(self, values: dict[str, dict[str, Any]]) -> float:
        """The task's part of GLUE's average: of MNLI the mean of both genres."""
        return float(np.mean([one[self.metric] for split, one in values.items()
                              if split.startswith('validation')]))

    def write(
        self, folder: Path, data: Labelled, split: str, outputs: dict[str, Any],
    ) -> list[Path]:
        """The predictions of a test split as GLUE's server takes them."""
        if not split.startswith('test'):
            return []
        logits = in_order(outputs)['logits']
        if self.problem == 'regression':
            guesses = [f'{value:.3f}' for value in np.clip(logits[:, 0], 0, MOST_SIMILAR)]
        else:
            written = list(self._task.labels)
            guesses = [written[number] for number in logits.argmax(1)]
        path = folder / glue.submission(self.name, split)
        with path.open('w', encoding='utf-8', newline='') as file:
            lines = csv.writer(file, delimiter='\t', lineterminator='\n')
            lines.writerow(['index', 'prediction'])
            lines.writerows(enumerate(guesses))
        return [path]
