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
are those of training steps, without compilation and evaluations. PyTorch needs pip install torch
transformers.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from pkm_jax import finetune
from pkm_jax.checkpoints.pretrained import open_pretrained
from pkm_jax.configs import glue, squad
from pkm_jax.configuration.finetuning import schedule_of
from pkm_jax.configuration.resolve import task_of

SIDES = ('ours', 'padded', 'torch', 'torch_dynamic', 'memory')
SOURCE = flags.DEFINE_string('source', None, 'Hugging Face folder of the weights.', required=True)
GLUE = flags.DEFINE_string('glue', 'glue', 'Unpacked download of GLUE.')
TRAIN = flags.DEFINE_string('train', '', 'Files in the form of SQuAD to train on.')
VALIDATION = flags.DEFINE_string('validation', '', 'Files in the form of SQuAD to validate on.')
TASKS = flags.DEFINE_list('tasks', ['sst2', 'cola', 'mrpc', 'stsb'], "Of GLUE, or 'squad'.")
WHICH = flags.DEFINE_list('sides', list(SIDES[:3]), f'Of {", ".join(SIDES)}.')
SEEDS = flags.DEFINE_list('seeds', ['1', '2', '3'], 'A run for each.')
EPOCHS = flags.DEFINE_float('epochs', 3., 'Passes over the training data.')
RATE = flags.DEFINE_float('learning_rate', 0., 'After warmup; 0: that of the configuration.')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'Of the computation.')
ATTENTION_DROPOUT = flags.DEFINE_float('attention_dropout', 0.1, '0: attention can be fused.')
WARM = 20       # steps that are not timed: what PyTorch compiles in


def configuration(task: str, folder: str, buckets: tuple[int, ...] = ()):
    """The configuration of a task, for both sides."""
    config = squad.get_config() if task == 'squad' else glue.get_config(f'task={task}')
    if task == 'squad':
        config.data.update(train=TRAIN.value, validation=VALIDATION.value)
    else:
        config.data.folder = GLUE.value
    config.data.buckets = buckets
    config.update(workdir=folder, init_from=SOURCE.value)
    config.model.update(dtype=DTYPE.value, attention_dropout=ATTENTION_DROPOUT.value)
    config.finetune.update(epochs=EPOCHS.value, seeds=tuple(map(int, SEEDS.value)))
    config.train.learning_rate = RATE.value or config.train.learning_rate
    return config


def ours(config) -> tuple[list[float], float]:
    """The score of each seed, and examples a second."""
    results = finetune.run(config)
    rates = []
    for path in Path(config.workdir).rglob('metrics.jsonl'):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rates += [line['examples_per_second'] for line in lines if line['kind'] == 'train'][1:]
    return results['scores'], statistics.median(rates)


@dataclasses.dataclass
class Torch:
    """A task in PyTorch, over the records that ours are made of."""
    task: object
    data: object
    config: dict
    dynamic: bool

    def run(self) -> tuple[list[float], float]:
        """The score of each seed, and examples a second."""
        found = [self.train(int(seed)) for seed in SEEDS.value]
        return [score for score, _ in found], statistics.median(rate for _, rate in found)

    def train(self, seed: int) -> tuple[float, float]:
        """The best score of one seed, and examples a second."""
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
            betas=(settings['beta1'], settings['beta2']), weight_decay=settings['weight_decay'])
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
                self.loss(compiled, [records[number] for number in order[place:place + size]]
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

    def batch(self, records):
        """Tokens, mask and segments, padded to the full length or to the longest record."""
        import torch
        length = (max(len(record['tokens']) for record in records) if self.dynamic else
                  self.task.length)
        tokens, mask, segments = np.zeros((3, len(records), length), np.int64)
        for row, record in enumerate(records):
            size = len(record['tokens'])
            tokens[row, :size], segments[row, :size] = record['tokens'], record['segments']
            mask[row, :size] = 1
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True)
                for name, array in (('input_ids', tokens), ('attention_mask', mask),
                                    ('token_type_ids', segments))}

    def outputs(self, model, records):
        import torch
        dtype = torch.bfloat16 if DTYPE.value == 'bfloat16' else None
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            return model(**self.batch(records))

    def loss(self, model, records):
        """The mean loss of a batch."""
        import torch
        found = self.outputs(model, records)
        if self.is_squad:
            return sum(torch.nn.functional.cross_entropy(
                logits.float(), torch.tensor([record[name] for record in records],
                                             device=self.device)) / 2
                for name, logits in (('start', found.start_logits), ('end', found.end_logits)))
        labels = torch.tensor(np.array([record['labels'] for record in records]),
                              device=self.device)
        if self.task.problem == 'regression':
            return torch.nn.functional.mse_loss(found.logits.float()[:, 0], labels.float())
        return torch.nn.functional.cross_entropy(found.logits.float(), labels.long())

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
                    parts.append(self.kept(self.outputs(model, some), some))
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            joined['example'] = np.arange(len(records))
            no_loss = {'loss': 0., 'terms': 1.}
            values[split] = self.task.evaluation(no_loss, joined, self.data, split)
        return self.task.score(values)

    def kept(self, found, records):
        """What our task's evaluation reads of a batch."""
        import torch
        if not self.is_squad:
            return {'logits': found.logits.float().cpu().numpy()}
        start, end = found.start_logits.float(), found.end_logits.float()
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


def measure(name: str, side: str) -> tuple[list[float], float]:
    """The scores of a task's seeds on one side, and its examples a second."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(name, folder)
        if side == 'padded':
            config.data.buckets = (config.data.length,)
        if side == 'memory':
            config.memory.update(placement='add', zero_start=True, sub_keys=128,
                                 layers=(open_pretrained(SOURCE.value).model.layers // 2,))
        if side in ('ours', 'padded', 'memory'):
            return ours(config)
        plain = config.to_dict()
        task = task_of(plain)
        data = task.prepare(SOURCE.value, print)
        return Torch(task.of_data(data), data, plain, side == 'torch_dynamic').run()


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    table = ['| task | side | score | examples/s |', '| --- | --- | --- | --- |']
    for name in TASKS.value:
        for side in WHICH.value:
            scores, rate = measure(name, side)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.
            table.append(f'| {name} | {side} | {statistics.mean(scores):.4f} ± {spread:.4f} | '
                         f'{rate:,.0f} |')
            print(table[-1], flush=True)
    print('\n'.join([f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {DTYPE.value}',
                     *table]))


if __name__ == '__main__':
    app.run(main)
