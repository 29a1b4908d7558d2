r"""Fine-tunes a model: python -m pkm_jax.finetune --config=NAME --config.init_from=FOLDER

    python -m pkm_jax.finetune --config=glue:task=mrpc --config.init_from=runs/bert_base_pkm \
        --config.data.folder=/data/glue
    python -m pkm_jax.finetune --config=squad:version=2 --config.init_from=FOLDER \
        --config.data.train=train-v2.0.json --config.data.validation=dev-v2.0.json
    python -m pkm_jax.finetune --config=text --config.init_from=FOLDER \
        --config.data.train=my.csv --config.data.text=review --config.data.label=stars

FOLDER is a run, one of its checkpoints, or a Hugging Face BERT folder. The same command goes on
where a run stopped. Results are in eval_results.json, predictions in predictions_SPLIT.jsonl.

Guide: docs/finetuning.md. Every field: docs/configuration.md. Files: docs/data.md.
"""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags

from pkm_jax.checkpoints import pretrained
from pkm_jax.configuration import command_line
from pkm_jax.configuration.finetuning import each, runs_of, schedule_of
from pkm_jax.configuration.resolve import task_of
from pkm_jax.configuration.run import Distributed, Run
from pkm_jax.data.labelled import Labelled
from pkm_jax.planning.out_of_memory import explained
from pkm_jax.processes import hosts
from pkm_jax.refusal import Refusal
from pkm_jax.report.report import write_report
from pkm_jax.tasks.finetuning import FinetuningTask
from pkm_jax.training import ending, start
from pkm_jax.training.evaluation import Evaluation
from pkm_jax.training.layout import lay_out_here
from pkm_jax.training.loop import train
from pkm_jax.training.scoring import score

Results = dict[str, Any]


def run(config: ml_collections.ConfigDict) -> Results:
    """Fine-tunes on every task of a configuration in turn; returns and writes what they reach.

    Raises:
      Refusal: settings, data or weights cannot be used. Stopped, Diverged: see `loop.train`.
    """
    start.use_compilation_cache(config.compilation_cache)
    hosts.join(Distributed(**config.distributed))
    found = {name: finetune(one) for name, one in each(config.to_dict())}
    if not config.runs:
        return found['']
    summary = {'tasks': found, 'average': float(np.mean([one['mean'] for one in found.values()]))}
    _write(Path(config.workdir) / 'summary.json', summary)
    hosts.say('\n'.join([*(_line(name, one) for name, one in found.items()),
                         f'average: {summary["average"]:.4f}']))
    return summary


def finetune(config: dict[str, Any]) -> Results:
    """Fine-tunes on one task, once for each learning rate and seed.

    Returns 'metric', by learning rate its 'mean' and 'deviation' over the seeds, and those of the
    best learning rate; 'runs' are the results of each.

    Raises:
      Refusal: settings, data or weights cannot be used. Stopped, Diverged: see `loop.train`.
    """
    if not config['init_from']:
        raise Refusal("init_from = '': name what to fine-tune: a run, one of its checkpoints or a "
                      "Hugging Face BERT folder.")
    task = task_of(config)
    vocabulary = task.vocab or pretrained.vocabulary_of(config['init_from'])
    with start.phase('preparing the data'):
        data = task.prepare(vocabulary, hosts.say)
    task = task.of_data(data)
    runs = runs_of(config, task, data, pretrained.open_pretrained(config['init_from']).model)
    layouts = [lay_out_here(one) for one in runs]
    results = {}
    for one, layout in zip(start.announced(runs), layouts):
        with explained(one, layout):
            train(one, layout, data)
        with start.phase('scoring the best weights'):
            found = score(one, layout, data, [split for split in data.splits if split != 'train'])
        results[one.name] = _report(one, task, data, found, schedule_of(config).epochs)
    if jax.process_index() == 0:
        page = write_report(Path(config['workdir']), [one.name for one in runs] if len(runs) > 1
                            else None)
        print(f'report: {page}')
    return _summary(Path(config['workdir']), task.metric, runs, results)


def _report(run: Run, task: FinetuningTask, data: Labelled, found: dict[str, Evaluation],
            epochs: float) -> Results:
    """Writes what a run reaches, and its predictions; returns the former."""
    results: Results = {'epoch': epochs}
    for split, evaluation in found.items():
        kind, _, part = split.partition('_')
        prefix = {'validation': 'eval'}.get(kind, kind)
        values = evaluation.values | task.baseline(data, split) | {
            'samples': data.num_records(split)}
        results |= {f'{prefix}_{name.removeprefix("eval_")}' + (f'_{part}' if part else ''): value
                    for name, value in values.items() if isinstance(value, (int, float))}
    results |= _usage(run, found['validation'])
    results['score'] = task.score({split: one.values for split, one in found.items()})
    if jax.process_index() == 0:
        _write(run.folder / 'eval_results.json', results)
        for split, evaluation in found.items():
            with (run.folder / f'predictions_{split}.jsonl').open('w', encoding='utf-8') as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + '\n'
                                for row in task.rows(data, split, evaluation.outputs))
            for path in task.write(run.folder, data, split, evaluation.outputs):
                hosts.say(f'written: {path}')
    hosts.say(f'{run.name}: ' + ', '.join(f'{name} {value:.4f}' for name, value in results.items()
                                          if isinstance(value, float)))
    return results


def _usage(run: Run, found: Evaluation) -> Results:
    """How each memory was used before and after, over the validation data."""
    if 'memory' not in found.values:
        return {}
    lines = map(json.loads, (run.folder / 'metrics.jsonl').read_text().splitlines())
    before = next(line for line in lines if line['kind'] == 'eval')['memory']
    return {'memory': {name: {'before': before[name], 'after': after}
                       for name, after in found.values['memory'].items()}}


def _summary(folder: Path, metric: str, runs: list[Run], results: dict[str, Results]) -> Results:
    """The mean and deviation over seeds for each learning rate; that of the best one."""
    scores: dict[float, list[float]] = {}
    for one in runs:
        scores.setdefault(one.train.learning_rate, []).append(results[one.name]['score'])
    rates: dict[str, Results] = {f'{rate:g}': {'mean': float(np.mean(some)), 'scores': some,
                           'deviation': float(np.std(some, ddof=1)) if len(some) > 1 else 0.}
             for rate, some in scores.items()}
    best = max(rates, key=lambda rate: rates[rate]['mean'])
    summary = {'metric': metric, 'learning_rate': float(best), **rates[best],
               'learning_rates': rates, 'runs': results}
    if len(runs) > 1:
        _write(folder / 'summary.json', summary)
        hosts.say('\n'.join(_line(f'learning rate {rate}', summary | one)
                            for rate, one in rates.items()))
    return summary


def _line(name: str, found: Results) -> str:
    return (f'{name}: {found["metric"]} {found["mean"]:.4f} ± {found["deviation"]:.4f} over '
            f'{len(found["scores"])} seed(s)')


def _write(path: Path, content: Results) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def main(_: list[str]) -> None:
    with ending.said():
        run(flags.FLAGS.config)


if __name__ == '__main__':      # defined here: pretrain.py has a flag of the same name
    command_line.define_config()
    app.run(main, flags_parser=command_line.parse)
