"""Questions, each answered by a part of its paragraph, or by none: SQuAD 1.1 and 2.0."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from pkm_jax.data.examples import ArraySpec
from pkm_jax.data.labelled import Labelled, Records
from pkm_jax.data.squad import Question, read_squad, unalignable
from pkm_jax.data.windows import Window, span_of, windows
from pkm_jax.fields import setting
from pkm_jax.models.bert import Bert, BertConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks import answers
from pkm_jax.tasks.finetuning import Labelling, file_of, in_order
from pkm_jax.tasks.interface import Batch, LossName, Outcome

NOWHERE = -1e30     # logit of a token that is no candidate
NAMED = 5           # questions of each kind that are named


class Source(NamedTuple):
    """The questions of a split, and the windows that its records are."""
    questions: list[Question]
    windows: list[Window]


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Labelling):
    """The first and the last token of the answer in each window over a paragraph.

    Raises:
      Refusal: a value is out of its range.
    """
    length: int = setting(384, 'L, tokens of a window', least=8)
    train: str = setting('', "files in SQuAD's JSON, with ',' between; .json, or also .gz or .xz")
    validation: str = setting('', 'files to validate on')
    test: str = setting('', "files to answer at the end; '': none")
    unanswerable: bool = setting(False, 'some questions have no answer, as in version 2.0')
    stride: int = setting(128, 'tokens that two windows over a paragraph share', least=0)
    n_best: int = setting(20, 'starts, ends and answers that are looked at', least=1)
    longest_answer: int = setting(30, 'tokens of an answer', least=1)
    null_threshold: float = setting(
        0., 'no answer is given where its score is better by more than this')
    loss_name = LossName('Answer loss', 'nats',
                         'mean cross-entropy of the first and the last token of the answers')
    head_name = 'span'
    metric = 'f1'

    def head(self, model: BertConfig) -> BertConfig:
        """The model with logits of starts and ends."""
        return dataclasses.replace(model, output_heads=('span',))

    def of_data(self, data: Labelled) -> Any:
        """The same with the buckets that occur."""
        return self.with_buckets(data)

    @property
    def targets(self) -> dict[str, ArraySpec]:
        """First and last token of the answer: [CLS] where it is not in the window."""
        return {'start': ArraySpec((), np.int32), 'end': ArraySpec((), np.int32)}

    def prepare(self, vocabulary: str, log: Callable[[str], None]) -> Labelled:
        """The windows of all questions.

        Raises:
          Refusal: a file cannot be used; it is named with the question.
        """
        words = self.vocabulary(vocabulary)
        splits, source = {}, {}
        for split in ('train', 'validation', 'test'):
            paths = [path.strip() for path in getattr(self, split).split(',')]
            if split == 'test' and paths == ['']:
                continue
            questions = read_squad([file_of(path, split) for path in paths])
            parts = windows(words, [one.question for one in questions],
                            [one.context for one in questions], self.length, self.stride)
            spans = [_span(questions[part.number], part) for part in parts]
            kept = self._learnable(questions, parts, spans, log) if split == 'train' else None
            chosen = range(len(parts)) if kept is None else kept
            source[split] = Source(questions, [parts[place] for place in chosen])
            splits[split] = Records(
                {**parts[place].tokens._asdict(), 'start': spans[place][0], 'end': spans[place][1]}
                for place in chosen)
            log(f'data: {len(questions):,} questions of {split} in {len(splits[split]):,} windows')
        return Labelled(self.vocab or vocabulary, len(words.tokens), splits, source)

    def _learnable(self, questions: Sequence[Question], parts: Sequence[Window],
                   spans: Sequence[tuple[int, int]], log: Callable[[str], None]) -> list[int]:
        """The windows of the questions whose answer is where it is said to be; says of the others.

        Raises:
          Refusal: questions without answer, though all should have one; or none is left.
        """
        without = [one for one in questions if not one.answers]
        if without and not self.unanswerable:
            raise Refusal(f'{without[0].place} has no answer, {len(without):,} of all have none: '
                          'set data.unanswerable = True (--config=squad:version=2), or take them '
                          'out.')
        wrong = {number: f'{one.place}: {why}' for number, one in enumerate(questions)
                 if (why := unalignable(one))}
        held = {part.number for part, span in zip(parts, spans) if span != (0, 0)}
        missed = {number: f'{one.place}: no window holds the answer {one.answers[0].text[:80]!r}'
                  for number, one in enumerate(questions)
                  if one.answers and number not in wrong and number not in held}
        for found, what in ((wrong, 'whose answer is not where it is said to be'),
                            (missed, 'whose answer cannot be aligned with tokens')):
            if found:
                shown = ''.join(f'\n  {line}' for line in list(found.values())[:NAMED])
                log(f'WARNING: {len(found):,} questions {what} are not learnt from:{shown}')
        left_out = wrong.keys() | missed.keys()
        if len(left_out) == len(questions):
            raise Refusal(f'{questions[0].place}: no question has an answer that can be aligned.')
        return [place for place, part in enumerate(parts) if part.number not in left_out]

    def outcome(
        self, model: Bert, batch: Batch, *, deterministic: bool,
        rngs: Key[Array, ''] | None = None, deltas: dict[Any, Array] | None = None,
    ) -> Outcome:
        """The mean cross-entropy of start and end, summed over windows; the best of both in each.

        Candidates are the tokens of the context and [CLS], which stands for no answer.
        """
        states, reads = model(batch['tokens'], batch['segments'], batch['lengths'],
                              deterministic=deterministic, rngs=rngs, deltas=deltas)
        logits = model.span_logits(states)
        places = jnp.arange(logits.shape[1])[None]
        context = (batch['segments'] == 1) & (places < batch['lengths'][:, None] - 1)
        losses = jnp.zeros(len(logits))
        outputs = {'example': batch['example'], 'null': jnp.sum(logits[:, 0], axis=-1)}
        for number, name in enumerate(('start', 'end')):
            of_all = jnp.where(context | (places == 0), logits[..., number], NOWHERE)
            losses += optax.softmax_cross_entropy_with_integer_labels(of_all, batch[name]) / 2
            best, tokens = jax.lax.top_k(jnp.where(context, logits[..., number], NOWHERE),
                                         min(self.n_best, self.buckets[0]))
            outputs |= {f'{name}_logits': best, f'{name}s': tokens}
        return Outcome(jnp.sum(losses * batch['weights']), {}, reads, outputs)

    def evaluation(
        self, sums: dict[str, Any], outputs: dict[str, Any], data: Labelled, split: str,
    ) -> dict[str, float]:
        """The mean loss, EM and F1 in percent; of version 2.0 by kind of question too."""
        questions, best = data.source[split].questions, self._best(data, split, outputs)
        values = {'loss': float(self.metrics(sums)['loss'])}
        if not any(one.answers for one in questions):
            return {}
        guesses = [one.answer(self._threshold) for one in best]
        if not self.unanswerable:
            return values | answers.scores(questions, guesses, None)
        odds = [one.null_odds for one in best]
        return (values | answers.scores(questions, guesses, odds)
                | answers.best_thresholds(questions, [one.answer(None) for one in best], odds))

    def rows(self, data: Labelled, split: str, outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to each question."""
        for one, best in zip(data.source[split].questions, self._best(data, split, outputs)):
            yield {'id': one.id, 'question': one.question, 'context': one.context,
                   'answers': [answer.text for answer in one.answers],
                   'prediction': best.answer(self._threshold),
                   'probability': best.candidates[0].probability if best.candidates else 0.}

    def write(
        self, folder: Path, data: Labelled, split: str, outputs: dict[str, Any],
    ) -> list[Path]:
        """predictions_SPLIT.json as the official evaluation reads it, the n best, and of version
        2.0 the odds of no answer."""
        ids = [one.id for one in data.source[split].questions]
        best = self._best(data, split, outputs)
        contents = {
            'predictions': [one.answer(self._threshold) for one in best],
            'nbest_predictions': [[candidate._asdict() for candidate in one.candidates]
                                  for one in best]}
        if self.unanswerable:
            contents['null_odds'] = [one.null_odds for one in best]
        paths = []
        for name, values in contents.items():
            paths.append(folder / f'{name}_{split}.json')
            paths[-1].write_text(json.dumps(dict(zip(ids, values)), indent=1, ensure_ascii=False)
                                 + '\n', encoding='utf-8')
        return paths

    @property
    def _threshold(self):
        return self.null_threshold if self.unanswerable else None

    def _best(self, data, split, outputs):
        source = data.source[split]
        return answers.n_best(source.questions, source.windows, in_order(outputs), self.n_best,
                              self.longest_answer)


def _span(question: Question, window: Window) -> tuple[int, int]:
    """The tokens of the first answer; (0, 0) where the window does not hold it."""
    if not question.answers:
        return 0, 0
    text, start = question.answers[0]
    return span_of(window, start, start + len(text)) or (0, 0)
