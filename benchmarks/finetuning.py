"""Fine-tuning here and in PyTorch: the same weights, texts, batches and recipe on one device.

    python -m benchmarks.finetuning --source=FOLDER --glue=/data/glue [--tasks=sst2,cola,mrpc,stsb]
    python -m benchmarks.finetuning --source=FOLDER --tasks=squad --sides=ours,torch \
        --train=amazon_reviews.json,reddit.json --validation=xquad.en.json

FOLDER is a Hugging Face BERT folder. Sides: `ours`, with batches padded to buckets; `padded`, ours
with all batches of full length; `torch`, transformers' model, compiled, with batches of full
length, which is run_glue's default; `torch_dynamic`, with batches as long as their longest text;
`memory`, ours with a memory of 128 × 128 slots added beside the middle layer, from zero.
Both read what `pkm_jax.data` has tokenised and are scored by the same functions. Scores are the
best of the evaluations after each epoch, as mean and deviation over the seeds; examples a second
are all training steps' but the first ones, without compilation and evaluations. PyTorch needs
pip install torch transformers.

Each seed of a side is written to RESULTS/results.jsonl when it is done. The same command goes on
where one was stopped: it passes over what is there, and a run of ours goes on from its checkpoint.
"""

import dataclasses
import importlib.util
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from pkm_jax import finetune
from pkm_jax.checkpoints.pretrained import open_pretrained
from pkm_jax.configs import glue, squad
from pkm_jax.configuration.finetuning import schedule_of
from pkm_jax.configuration.resolve import task_of

SIDES = ('ours', 'padded', 'torch', 'torch_dynamic', 'memory')
RESULTS = flags.DEFINE_string('results', 'runs/finetuning_benchmark', 'Folder of the results.')
SOURCE = flags.DEFINE_string('source', None, 'Hugging Face folder of the weights.', required=True)
GLUE = flags.DEFINE_string('glue', 'glue', 'Unpacked download of GLUE.')
TRAIN = flags.DEFINE_string('train', '', 'Files in the form of SQuAD to train on.')
VALIDATION = flags.DEFINE_string('validation', '', 'Files in the form of SQuAD to validate on.')
TASKS = flags.DEFINE_list('tasks', ['sst2', 'cola', 'mrpc', 'stsb'], "Of GLUE, or 'squad'.")
WHICH = flags.DEFINE_list('sides', list(SIDES[:3]), f'Of {", ".join(SIDES)}.')
SEEDS = flags.DEFINE_list('seeds', ['1', '2', '3'], 'A run for each.')
EPOCHS = flags.DEFINE_float('epochs', 3., 'Passes over the training data.')
RATE = flags.DEFINE_float('learning_rate', 0., 'After warmup; 0: that of the configuration.')
BATCH = flags.DEFINE_integer('batch', 32, 'Examples of a step.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'Of the computation.')
ATTENTION_DROPOUT = flags.DEFINE_float('attention_dropout', 0.1, '0: attention can be fused.')
WARM = 20       # steps that are not timed: what PyTorch compiles in


def configuration(task: str, side: str, seed: int):
    """The configuration of a run, for both sides."""
    config = squad.get_config() if task == 'squad' else glue.get_config(f'task={task}')
    if task == 'squad':
        config.data.update(train=TRAIN.value, validation=VALIDATION.value)
    else:
        config.data.folder = GLUE.value
    if side == 'padded':
        config.data.buckets = (config.data.length,)
    if side == 'memory':
        config.memory.update(placement='add', zero_start=True, sub_keys=128,
                             layers=(open_pretrained(SOURCE.value).model.layers // 2,))
    config.update(workdir=f'{RESULTS.value}/{task}-{side}-{seed}', init_from=SOURCE.value)
    config.model.update(dtype=DTYPE.value, attention_dropout=ATTENTION_DROPOUT.value)
    config.finetune.update(epochs=EPOCHS.value, seeds=(seed,))
    config.train.batch = BATCH.value
    config.train.learning_rate = RATE.value or config.train.learning_rate
    return config


def ours(config) -> tuple[float, float]:
    """The score, and examples a second."""
    results = finetune.run(config)
    with (Path(config.workdir) / 'metrics.jsonl').open() as file:
        lines = [line for line in map(json.loads, file) if line['kind'] == 'train']
    steps = np.diff([line['step'] for line in lines])
    rates = [line['steps_per_second'] for line in lines[1:]]        # the first one's has the start
    seconds = sum(some / rate for some, rate in zip(steps, rates))
    return results['mean'], config.train.batch * float(sum(steps)) / seconds


@dataclasses.dataclass
class Torch:
    """A task in PyTorch, over the records that ours are made of."""
    task: object
    data: object
    config: dict
    dynamic: bool

    def train(self, seed: int) -> tuple[float, float]:
        """The best score, and examples a second."""
        import torch
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision('high')
        settings, epochs = self.config['train'], schedule_of(self.config).epochs
        model = self.model().to(self.device)
        compiled = torch.compile(model, dynamic=self.dynamic)
        records, size = self.data.records('train'), settings['batch']
        steps = int(np.ceil(-(-len(records) // size) * epochs))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings['learning_rate'], eps=settings['epsilon'],
            betas=(settings['beta1'], settings['beta2']), weight_decay=settings['weight_decay'],
            fused=self.device == 'cuda')     # as transformers' Trainer has it
        warmup = int(steps * schedule_of(self.config).warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(step / max(warmup, 1), (steps - step) / (steps - warmup)))
        rng, best, step, timed, seconds = np.random.default_rng(seed), -np.inf, 0, 0, 0.
        while step < steps:
            model.train()
            order, start = rng.permutation(len(records)), time.perf_counter()
            first = step
            for place in range(0, len(order), size):
                if step == steps:
                    break
                if step == WARM:
                    self.wait()
                    start, first = time.perf_counter(), step
                self.loss(compiled, [records[number] for number in order[place:place + size]], size
                          ).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings['clip'])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
            self.wait()
            if step > WARM:
                seconds, timed = seconds + time.perf_counter() - start, timed + step - first
            best = max(best, self.score(model))
        return best, timed * size / seconds

    @property
    def device(self) -> str:
        import torch
        return 'cuda' if torch.cuda.is_available() else 'cpu'

    def wait(self) -> None:
        import torch
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def model(self):
        """transformers' model of the task."""
        import transformers
        options = dict(attention_probs_dropout_prob=self.config['model']['attention_dropout'],
                       hidden_dropout_prob=self.config['model']['dropout'])
        if self.is_squad:
            model = transformers.BertForQuestionAnswering.from_pretrained(SOURCE.value, **options)
        else:
            model = transformers.BertForSequenceClassification.from_pretrained(
                SOURCE.value, num_labels=self.task.classes, **options)
        return model.float()        # folders of halves too: the computation alone has a dtype

    @property
    def is_squad(self) -> bool:
        return self.task.head_name == 'span'

    def batch(self, records, rows):
        """Tokens, mask and segments, padded to the full length or to the longest record.

        A batch of fewer than `rows` records has its first one again: another shape would be another
        program.
        """
        import torch
        length = (max(len(record['tokens']) for record in records) if self.dynamic else
                  self.task.length)
        tokens, mask, segments = np.zeros((3, rows, length), np.int64)
        for row, record in enumerate([*records, *[records[0]] * (rows - len(records))]):
            size = len(record['tokens'])
            tokens[row, :size], segments[row, :size] = record['tokens'], record['segments']
            mask[row, :size] = 1
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True)
                for name, array in (('input_ids', tokens), ('attention_mask', mask),
                                    ('token_type_ids', segments))}

    def outputs(self, model, records, rows):
        """The logits for each record, of both kinds for questions."""
        import torch
        dtype = torch.bfloat16 if DTYPE.value == 'bfloat16' else None
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            found = model(**self.batch(records, rows))
        names = ('start_logits', 'end_logits') if self.is_squad else ('logits',)
        return [found[name][:len(records)].float() for name in names]

    def loss(self, model, records, rows):
        """The mean loss of a batch."""
        import torch
        found = self.outputs(model, records, rows)
        if self.is_squad:
            return sum(torch.nn.functional.cross_entropy(
                logits, torch.tensor([record[name] for record in records],
                                             device=self.device)) / 2
                for name, logits in zip(('start', 'end'), found))
        labels = torch.tensor(np.array([record['labels'] for record in records]),
                              device=self.device)
        if self.task.problem == 'regression':
            return torch.nn.functional.mse_loss(found[0][:, 0], labels.float())
        return torch.nn.functional.cross_entropy(found[0], labels.long())

    def score(self, model) -> float:
        """The task's score over the splits to validate on."""
        import torch
        model.eval()
        values = {}
        for split in (name for name in self.data.splits if name.startswith('validation')):
            records, parts = self.data.records(split), []
            for start in range(0, len(records), 64):
                some = records[start:start + 64]
                with torch.no_grad():
                    parts.append(self.kept(self.outputs(model, some, len(some)), some))
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            joined['example'] = np.arange(len(records))
            no_loss = {'loss': 0., 'terms': 1.}
            values[split] = self.task.evaluation(no_loss, joined, self.data, split)
        return self.task.score(values)

    def kept(self, found, records):
        """What our task's evaluation reads of a batch."""
        import torch
        if not self.is_squad:
            return {'logits': found[0].cpu().numpy()}
        start, end = found
        context = torch.zeros_like(start, dtype=torch.bool)
        for row, record in enumerate(records):
            of_context = torch.from_numpy(record['segments'][:-1] == 1)
            context[row, :len(of_context)] = of_context
        kept = {'null': (start[:, 0] + end[:, 0]).cpu().numpy()}
        for name, logits in (('start', start), ('end', end)):
            best = torch.topk(logits.masked_fill(~context, -1e30),
                              min(self.task.n_best, logits.shape[1]))
            kept |= {f'{name}_logits': best.values.cpu().numpy(),
                     f'{name}s': best.indices.cpu().numpy()}
        return kept


def measure(task: str, side: str, seed: int) -> tuple[float, float]:
    """The score of a seed on one side, and its examples a second."""
    config = configuration(task, side, seed)
    if not side.startswith('torch'):
        return ours(config)
    plain = config.to_dict()
    made = task_of(plain)
    data = made.prepare(SOURCE.value, print)
    return Torch(made.of_data(data), data, plain, side == 'torch_dynamic').train(seed)


def settings() -> dict[str, Any]:
    """What results have to have in common to be compared."""
    return {'source': SOURCE.value, 'epochs': EPOCHS.value, 'batch': BATCH.value,
            'learning_rate': RATE.value, 'dtype': DTYPE.value,
            'attention_dropout': ATTENTION_DROPOUT.value,
            **{name: metadata.version(name) for name in ('jax', 'torch', 'transformers')
               if importlib.util.find_spec(name)},
            'device': jax.devices()[0].device_kind}


def known(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The results that are there for these settings, by task, side and seed."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(line['task'], line['side'], line['seed']): line for line in lines
            if line['settings'] == settings()}


def rows(results: dict[tuple[str, str, int], dict[str, Any]]) -> Iterator[str]:
    """A table of the results, side by side."""
    yield '| task | side | score | seeds | examples/s | of PyTorch\'s |'
    yield '| --- | --- | --- | --- | --- | --- |'
    for task, side in dict.fromkeys((task, side) for task, side, _ in results):
        def of(side, name, task=task):
            return [line[name] for (*place, _), line in results.items() if place == [task, side]]
        scores, theirs = of(side, 'score'), of('torch', 'examples_per_second')
        rate = statistics.median(of(side, 'examples_per_second'))
        spread = f' ± {statistics.stdev(scores):.4f}' if len(scores) > 1 else ''
        ratio = f'{rate / statistics.median(theirs):.2f} ×' if theirs else ''
        yield (f'| {task} | {side} | {statistics.mean(scores):.4f}{spread} | {len(scores)} | '
               f'{rate:,.0f} | {ratio} |')


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    path = Path(RESULTS.value) / 'results.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for place in itertools.product(TASKS.value, WHICH.value, map(int, SEEDS.value)):
        if place in known(path):
            continue
        begun = time.perf_counter()
        try:
            score, rate = measure(*place)
        except Exception:       # the others are wanted all the same
            traceback.print_exc()
            failed.append(place)
            continue
        line = dict(zip(('task', 'side', 'seed'), place)) | {
            'score': score, 'examples_per_second': rate, 'seconds': time.perf_counter() - begun,
            'settings': settings()}
        with path.open('a') as file:
            file.write(json.dumps(line) + '\n')
        print(json.dumps(line), flush=True)
    print('\n'.join([str(settings()), *rows(known(path))]))
    if failed:
        sys.exit(f'failed: {failed}')


if __name__ == '__main__':
    app.run(main)
