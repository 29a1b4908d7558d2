"""Texts or pairs of texts, and a class, several classes or a number for each."""

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from scipy import special

from pkm_jax.data import columns, sequences
from pkm_jax.data.columns import Texts
from pkm_jax.data.examples import ArraySpec
from pkm_jax.data.labelled import Labelled, Records
from pkm_jax.data.tables import read_table
from pkm_jax.fields import setting
from pkm_jax.models.bert import Bert, BertConfig
from pkm_jax.ops.dropout import split_key
from pkm_jax.refusal import Refusal
from pkm_jax.tasks import scores
from pkm_jax.tasks.finetuning import Labelling, file_of, in_order
from pkm_jax.tasks.interface import Batch, LossName, Outcome

PROBLEMS = ('single_label', 'multi_label', 'regression')
METRIC = {'single_label': 'accuracy', 'multi_label': 'micro_f1', 'regression': 'spearmanr'}
SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class TextClassification(Labelling):
    """Texts with classes or numbers, whichever files they come from.

    Raises:
      Refusal: a value is out of its range.
    """
    labels: tuple[str, ...] = setting((), 'names of the classes, in the order of the outputs; (): '
                                          'those in the training data')
    class_weights: str = setting('none', "of the loss: 'none', or 'balanced' for the same share of "
                                 'all classes', choices=('none', 'balanced'))
    head_name = 'classifier'
    separator = ''

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) == 1 and self.problem == 'single_label':
            raise Refusal(f'data.labels = {self.labels}: name two classes or more, or none.')
        if self.class_weights != 'none' and self.problem != 'single_label':
            raise Refusal(f'data.class_weights = {self.class_weights!r} with data.problem = '
                          f"{self.problem!r}: only 'single_label' has classes to weigh.")

    @property
    @abc.abstractmethod
    def problem(self) -> str:
        """One of PROBLEMS."""

    @abc.abstractmethod
    def read(self, log: Callable[[str], None]) -> dict[str, Texts]:
        """The texts of each split.

        Raises:
          Refusal: a file cannot be used; it is named with the line.
        """

    @property
    def classes(self) -> int:
        """Outputs of the model."""
        return 1 if self.problem == 'regression' else len(self.labels)

    def head(self, model: BertConfig) -> BertConfig:
        """The model with a classifier over its pooler."""
        return dataclasses.replace(model, output_heads=('pooler', 'classifier'),
                                   classes=self.classes)

    @property
    def targets(self) -> dict[str, ArraySpec]:
        """A class with its weight in the loss, all classes, or a number."""
        labels = {'single_label': ArraySpec((), np.int32),
                  'multi_label': ArraySpec((self.classes,), np.float32),
                  'regression': ArraySpec((), np.float32)}[self.problem]
        return {'labels': labels, 'loss_weights': ArraySpec((), np.float32)}

    def prepare(self, vocabulary: str, log: Callable[[str], None]) -> Labelled:
        """The files as sequences of tokens with their targets.

        Raises:
          Refusal: a file cannot be used, a label is not known, or all have the same.
        """
        words = self.vocabulary(vocabulary)
        texts = self.read(log)
        parsed = {split: self._parsed(one) for split, one in texts.items()}
        names = self.names(parsed) if self.problem != 'regression' else ()
        if len(names) == 1 and self.problem == 'single_label':
            raise Refusal(f'{texts["train"].places[0]}: all examples have the label {names[0]!r}: '
                          f'there is nothing to tell apart.')
        targets = {split: self._targets(found, names, texts[split].places)
                   for split, found in parsed.items()}
        self._say(targets['train'], names, log)
        weights = (columns.balanced(targets['train'].tolist(), len(names))
                   if self.class_weights == 'balanced' else None)
        splits = {}
        for split, one in texts.items():
            tokens = sequences.encode(words, one.texts, one.seconds, self.length)
            splits[split] = Records(
                {**sequence._asdict(), **({} if target is None else {
                    'labels': target, 'loss_weights': 1. if weights is None else weights[target]})}
                for sequence, target in zip(tokens, targets[split]))
        return Labelled(self.vocab or vocabulary, len(words.tokens), splits,
                        {split: (one, names) for split, one in texts.items()})

    def of_data(self, data: Labelled) -> Any:
        """The same with the names of the classes, and the buckets that occur."""
        _, names = data.source['train']
        return dataclasses.replace(self.with_buckets(data), labels=tuple(names))

    def names(self, found: dict[str, Any]) -> tuple[str, ...]:
        """The names of the classes, by the names found in each split."""
        return self.labels or columns.label_names(found['train'])

    def _parsed(self, texts):
        if texts.labels is None:
            return None
        if self.problem == 'regression':
            return columns.values_of(texts.labels, texts.places)
        separator = self.separator if self.problem == 'multi_label' else ''
        return [columns.names_of(label, place, separator)
                for label, place in zip(texts.labels, texts.places)]

    def _targets(self, parsed, names, places):
        """A target for each text; None where it is not known."""
        if parsed is None:
            return [None] * len(places)
        if self.problem == 'regression':
            return parsed.astype(np.float32)
        numbers = columns.numbers_of(parsed, names, places, not self.labels)
        if self.problem == 'single_label':
            return np.array([number for number, in numbers], np.int32)
        sets = np.zeros((len(numbers), len(names)), np.float32)
        for row, some in zip(sets, numbers):
            row[some] = 1
        return sets

    def _say(self, targets, names, log):
        if self.problem == 'regression':
            log(f'labels: {len(targets):,} numbers from {targets.min():g} to {targets.max():g}, '
                f'{targets.mean():g} on average')
            return
        counts = (np.bincount(targets, minlength=len(names)) if targets.ndim == 1 else
                  targets.sum(0).astype(int))
        if unseen := [name for name, count in zip(names, counts) if not count]:
            log(f'WARNING: no training example has the label {", ".join(unseen)}')
        log(f'labels of {len(targets):,} training examples: ' + ', '.join(
            f'{name} {count:,}' for name, count in zip(names, counts)))

    @property
    def loss_name(self) -> LossName:
        """By what the problem is."""
        if self.problem == 'regression':
            return LossName('Squared error', '', 'mean square of what estimates are off')
        return LossName('Label loss', 'nats', 'mean cross-entropy of the labels' + (
            ', of each class on its own' if self.problem == 'multi_label' else ''))

    def outcome(
        self, model: Bert, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """Cross-entropy, that of each class on its own, or squared errors, summed over the
        examples; the logits or estimates [B, classes] of each."""
        keys = split_key(rngs, 2)
        states, reads = model(batch['tokens'], batch['segments'], batch['lengths'],
                              deterministic=deterministic, rngs=keys[0], deltas=deltas)
        logits = model.class_logits(states, keys[1])
        losses = self._losses(logits, batch['labels']) * batch['loss_weights'] * batch['weights']
        return Outcome(jnp.sum(losses), {}, reads, {'logits': logits, 'example': batch['example']})

    def _losses(self, logits: Float[Array, 'B classes'], labels: Array) -> Float[Array, 'B']:
        if self.problem == 'regression':
            return (logits[:, 0] - labels) ** 2
        if self.problem == 'multi_label':
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Labelled, split: str,
    ) -> dict[str, float]:
        """The mean loss, and scores by what the problem is; nothing where labels are not known."""
        records = data.records(split)
        if 'labels' not in records[0]:
            return {}
        labels = np.stack([record['labels'] for record in records])
        logits = in_order(outputs)['logits']
        values = {'loss': float(self.metrics(sums)['loss'])}
        if self.problem == 'regression':
            return values | scores.of_numbers(labels, logits[:, 0])
        if self.problem == 'multi_label':
            return values | scores.of_label_sets(labels > 0, logits > 0)
        return values | scores.of_classes(labels, logits.argmax(1))

    def baseline(self, data: Labelled, split: str) -> dict[str, float]:
        """What one reaches who always says the commonest class of the training data."""
        if self.problem != 'single_label' or 'labels' not in data.records(split)[0]:
            return {}
        commonest, _ = Counter(int(record['labels']) for record in data.records('train')
                               ).most_common(1)[0]
        labels = [record['labels'] for record in data.records(split)]
        return {'majority_accuracy': float(np.mean(np.array(labels) == commonest))}

    def rows(self, data: Labelled, split: str, outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is said of each text: a class with its probability, classes, or a number."""
        texts, _ = data.source[split]
        logits = in_order(outputs)['logits']
        for number, row in enumerate(logits.astype(np.float64)):
            label = self._named(data.records(split)[number].get('labels'))
            seconds = {} if texts.seconds is None else {'text_pair': texts.seconds[number]}
            yield {'place': texts.places[number], 'text': texts.texts[number], **seconds,
                   'label': label, **self.said(row)}

    def _named(self, label):
        """A target as it is read: a name, names or a number; None where it is not known."""
        if label is None or self.problem == 'regression':
            return label if label is None else float(label)
        if self.problem == 'multi_label':
            return [name for name, holds in zip(self.labels, label) if holds]
        return self.labels[label]

    def said(self, logits: Float[np.ndarray, 'classes']) -> dict[str, Any]:
        """What the outputs for a text say: a class, classes or a number, and probabilities."""
        if self.problem == 'regression':
            return {'prediction': float(logits[0])}
        if self.problem == 'multi_label':
            shares = special.expit(logits)
            return {'prediction': [name for name, share in zip(self.labels, shares) if share > .5],
                    'probabilities': dict(zip(self.labels, map(float, shares)))}
        shares = special.softmax(logits)
        return {'prediction': self.labels[int(np.argmax(shares))],
                'probabilities': dict(zip(self.labels, map(float, shares)))}


@dataclasses.dataclass(frozen=True)
class Classification(TextClassification):
    """One's own files: .tsv, .csv, .jsonl or .parquet, with columns named here.

    Raises:
      Refusal: a value is out of its range.
    """
    train: str = setting('', 'file to train on: .tsv, .csv, .jsonl or .parquet')
    validation: str = setting('', "file to validate on; '': a share of the training data")
    test: str = setting('', "file to predict at the end, with labels or without; '': none")
    validation_fraction: float = setting(
        0.1, 'share of the training data that is held out where validation is not named',
        above=0, below=1)
    text: str = setting('text', 'column of the text')
    text_pair: str = setting('', "column of the second text of a pair; '': single texts")
    label: str = setting('label', 'column of the label')
    problem: str = setting(
        'single_label', 'a class of each text, any number of them, or a number', choices=PROBLEMS)
    separator: str = setting('|', "between the names in a label, with problem = 'multi_label'")

    @property
    def metric(self) -> str:    # type: ignore[override]
        """By which the best weights are chosen."""
        return METRIC[self.problem]

    def read(self, log: Callable[[str], None]) -> dict[str, Texts]:
        """The texts of each split.

        Raises:
          Refusal: a file cannot be used; it is named with the line.
        """
        found = {}
        for split in SPLITS:
            if path := getattr(self, split):
                needed = [name for name in (self.text, self.text_pair) if name]
                labels = [self.label] if split != 'test' else []
                rows = read_table(file_of(path, split), [*needed, *labels], [self.label])
                known = self.label in rows[0].values
                found[split] = columns.texts_of(rows, self.text, self.text_pair,
                                                self.label if known else '')
        if 'train' not in found:
            file_of(self.train, 'train')
        if 'validation' not in found:
            parts = columns.held_out(len(found['train'].texts), self.validation_fraction)
            log(f'data: {len(parts[1]):,} of {sum(map(len, parts)):,} examples are held out for '
                f'validation (data.validation_fraction); data.validation names a file of its own')
            whole = found['train']
            found['train'], found['validation'] = (_chosen(whole, part) for part in parts)
        return found

def _chosen(texts: Texts, numbers: Any) -> Texts:
    return Texts(*(part and [part[number] for number in numbers] for part in texts))
