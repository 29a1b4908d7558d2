"""A class for each word: entities, parts of speech."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from pkm_jax.data import columns
from pkm_jax.data.conll import Sentence, read_conll
from pkm_jax.data.examples import ArraySpec
from pkm_jax.data.labelled import Labelled, Records
from pkm_jax.data.words import Words, encode_words
from pkm_jax.fields import setting
from pkm_jax.models.bert import Bert, BertConfig
from pkm_jax.ops.dropout import split_key
from pkm_jax.refusal import Refusal
from pkm_jax.tasks import entities
from pkm_jax.tasks import scores as metrics
from pkm_jax.tasks.finetuning import Labelling, file_of, in_order
from pkm_jax.tasks.interface import Batch, LossName, Outcome

NO_WORD = -1        # the label of a token that is not the first of a word


class Source(NamedTuple):
    """The sentences of a split, the sequences that its records are, the names of the classes."""
    sentences: list[Sentence]
    sequences: list[Words]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TokenClassification(Labelling):
    """Files with a word and its label a line, as CoNLL's.

    Raises:
      Refusal: a value is out of its range.
    """
    train: str = setting('', 'file to train on: a word and its label a line')
    validation: str = setting('', "file to validate on; '': a share of the training data")
    test: str = setting('', "file to predict at the end, with its labels; '': none")
    validation_fraction: float = setting(
        0.1, 'share of the sentences that is held out where validation is not named',
        above=0, below=1)
    word_column: int = setting(0, 'column of the word, counted from 0 or back from -1')
    label_column: int = setting(-1, 'column of the label')
    labels: tuple[str, ...] = setting((), 'names of the classes, in the order of the outputs; (): '
                                          'those in the training data')
    loss_name = LossName('Label loss', 'nats', 'mean cross-entropy of the labels of words')
    head_name = 'token_classifier'

    @property
    def metric(self) -> str:    # type: ignore[override]
        """F1 of entities; of other labels the share of the words that are right."""
        return 'f1' if entities.are_entities(self.labels) else 'accuracy'

    def head(self, model: BertConfig) -> BertConfig:
        """The model with a classifier of tokens."""
        return dataclasses.replace(model, output_heads=('token_classifier',),
                                   classes=len(self.labels))

    @property
    def targets(self) -> dict[str, ArraySpec]:
        """The class of each token that is the first of a word."""
        return {'labels': ArraySpec((self.length,), np.int32, NO_WORD, by_token=True)}

    def read(self, log: Callable[[str], None]) -> dict[str, list[Sentence]]:
        """The sentences of each split.

        Raises:
          Refusal: a file cannot be used; it is named with the line.
        """
        found = {split: read_conll(file_of(path, split), self.word_column, self.label_column)
                 for split in ('train', 'validation', 'test')
                 if (path := getattr(self, split)) or split == 'train'}
        if 'validation' not in found:
            whole = found['train']
            parts = columns.held_out(len(whole), self.validation_fraction)
            log(f'data: {len(parts[1]):,} of {len(whole):,} sentences are held out for validation '
                f'(data.validation_fraction); data.validation names a file of its own')
            found['train'], found['validation'] = ([whole[number] for number in part]
                                                   for part in parts)
        return found

    def prepare(self, vocabulary: str, log: Callable[[str], None]) -> Labelled:
        """The sentences as sequences of tokens with a class for the first of each word.

        Raises:
          Refusal: a file cannot be used, or a label is not known; it is named with the line.
        """
        words = self.vocabulary(vocabulary)
        sentences = self.read(log)
        names = self.labels or columns.label_names([one.labels for one in sentences['train']])
        if len(names) < 2:
            raise Refusal(f'{sentences["train"][0].place(0)}: all words have the label '
                          f'{names[0]!r}: there is nothing to tell apart.')
        splits, source = {}, {}
        for split, some in sentences.items():
            numbers = self._numbers(some, names)
            sequences = encode_words(words, [one.words for one in some], self.length)
            splits[split] = Records(self._record(one, numbers[one.number]) for one in sequences)
            source[split] = Source(some, sequences, names)
        counts = Counter(label for one in sentences['train'] for label in one.labels)
        log(f'labels of {counts.total():,} training words: '
            + ', '.join(f'{name} {counts[name]:,}' for name in names))
        return Labelled(self.vocab or vocabulary, len(words.tokens), splits, source)

    def _numbers(self, sentences: Sequence[Sentence], names: Sequence[str]) -> list[np.ndarray]:
        return [np.array([number for number, in columns.numbers_of(
            [[label] for label in one.labels], names,
            [one.place(word) for word in range(len(one.words))], not self.labels)], np.int32)
            for one in sentences]

    def _record(self, one: Words, numbers: np.ndarray) -> dict[str, np.ndarray]:
        labels = np.full(len(one.tokens.tokens), NO_WORD, np.int32)
        labels[one.places] = numbers[one.words]
        return {**one.tokens._asdict(), 'labels': labels}

    def of_data(self, data: Labelled) -> Any:
        """The same with the names of the classes, and the buckets that occur."""
        return dataclasses.replace(self.with_buckets(data), labels=data.source['train'].names)

    def terms(self, batch: Batch) -> Float[Array, '']:
        """Words."""
        return jnp.sum(batch['labels'] != NO_WORD, dtype=jnp.float32)

    def outcome(
        self, model: Bert, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """Cross-entropy summed over the words, and the likeliest class of each token."""
        keys = split_key(rngs, 2)
        states, reads = model(batch['tokens'], batch['segments'], batch['lengths'],
                              deterministic=deterministic, rngs=keys[0], deltas=deltas)
        logits, labels = model.token_logits(states, keys[1]), batch['labels']
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # As long as the longest, whatever the batch is padded to.
        guesses = jnp.pad(guesses, ((0, 0), (0, self.length - guesses.shape[1])))
        return Outcome(jnp.sum(jnp.where(labels == NO_WORD, 0, losses)), {}, reads,
                       {'classes': guesses, 'example': batch['example']})

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Labelled, split: str,
    ) -> dict[str, float]:
        """The mean loss over words, their accuracy, and scores of entities where labels are."""
        gold = [one.labels for one in data.source[split].sentences]
        guessed = self._guessed(data, split, outputs)
        pairs = [np.array([self.labels.index(label) for some in side for label in some])
                 for side in (gold, guessed)]
        values = {'loss': float(self.metrics(sums)['loss'])}
        if entities.are_entities(self.labels):
            return (values | {'accuracy': float(np.mean(pairs[0] == pairs[1]))}
                    | entities.scores(gold, guessed))
        return values | metrics.of_classes(*pairs)

    def _guessed(self, data: Labelled, split: str, outputs: dict[str, Any]) -> list[list[str]]:
        """The label of each word of each sentence, whose parts are joined again."""
        source, classes = data.source[split], in_order(outputs)['classes']
        found: list[list[str]] = [[] for _ in source.sentences]
        for one, row in zip(source.sequences, classes):
            found[one.number] += [self.labels[number] for number in row[one.places]]
        return found

    def rows(self, data: Labelled, split: str, outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The words of each sentence with their labels and what is said of them."""
        for one, guessed in zip(data.source[split].sentences, self._guessed(data, split, outputs)):
            yield {'place': one.place(0), 'words': one.words, 'labels': one.labels,
                   'prediction': guessed}

    def write(
        self, folder: Path, data: Labelled, split: str, outputs: dict[str, Any],
    ) -> list[Path]:
        """predictions_SPLIT.txt for conlleval: a word, its label, and what is said of it."""
        path = folder / f'predictions_{split}.txt'
        with path.open('w', encoding='utf-8') as file:
            for row in self.rows(data, split, outputs):
                file.writelines(f'{word} {label} {guess}\n' for word, label, guess in zip(
                    row['words'], row['labels'], row['prediction']))
                file.write('\n')
        return [path]
