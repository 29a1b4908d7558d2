"""Answers to questions: the best of a model's spans, and their scores by SQuAD's definitions.

https://rajpurkar.github.io/SQuAD-explorer: answers are compared without case, punctuation, articles
and white space. EM is 1 where they are equal, F1 that of their words; each is the best over the
answers that people gave.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pkm_jax.data.squad import Question
from pkm_jax.data.windows import Window

_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(a|an|the)\b')

WORST = -1e9        # the score of an answer where no token can be one


class Candidate(NamedTuple):
    """A span of a context, its start's and end's logit together, and its share of the n best."""
    text: str
    score: float
    probability: float


class Best(NamedTuple):
    """The n best answers to a question, best first, and the score of there being none."""
    candidates: list[Candidate]
    null_score: float

    @property
    def null_odds(self) -> float:
        """By how much no answer is better than the best one."""
        return self.null_score - (self.candidates[0].score if self.candidates else WORST)

    def answer(self, null_threshold: float | None) -> str:
        """The best answer; '' where none is better by more than the threshold, which is None where
        every question has one."""
        if not self.candidates or null_threshold is not None and self.null_odds > null_threshold:
            return ''
        return self.candidates[0].text


def n_best(
    questions: Sequence[Question], windows: Sequence[Window], outputs: dict[str, Any], number: int,
    longest: int,
) -> list[Best]:
    """The n best answers to each question over all of its windows.

    `outputs` hold by window the best 'starts' and 'ends' among its tokens with their logits
    'start_logits' and 'end_logits', and the logits 'null' of [CLS] together; an answer has at most
    `longest` tokens.
    """
    found: list[list[tuple[float, int, int]]] = [[] for _ in questions]
    null = np.full(len(questions), np.inf)
    for place, window in enumerate(windows):
        null[window.number] = min(null[window.number], outputs['null'][place])
        starts, ends = (outputs[name][place][:, None] - window.first for name in ('starts', 'ends'))
        total = outputs['start_logits'][place][:, None] + outputs['end_logits'][place][None]
        size = len(window.offsets)
        fits = ((starts >= 0) & (starts < size) & (size > ends.T) & (starts <= ends.T)
                & (ends.T - starts < longest))
        pairs = np.argwhere(fits)
        kept = pairs[np.argsort(-total[fits], kind='stable')[:number]]
        found[window.number] += [
            (float(total[a, b]), int(window.offsets[starts[a, 0], 0]),
             int(window.offsets[ends[b, 0], 1])) for a, b in kept]
    return [Best(_candidates(question, spans, number), float(score))
            for question, spans, score in zip(questions, found, null)]


def _candidates(question, spans, number):
    best: dict[tuple[int, int], float] = {}     # windows overlap: a span can be in two
    for score, start, end in sorted(spans, key=lambda span: -span[0]):
        best.setdefault((start, end), score)
    chosen = list(best.items())[:number]
    if not chosen:
        return []
    scores = np.array([score for _, score in chosen])
    shares = np.exp(scores - scores.max())
    return [Candidate(question.context[start:end], score, float(share))
            for ((start, end), score), share in zip(chosen, shares / shares.sum())]


def normalized(text: str) -> str:
    """What is compared of an answer."""
    return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, guess: str) -> float:
    """1 where both are the same answer."""
    return float(normalized(gold) == normalized(guess))


def f1(gold: str, guess: str, empty: bool) -> float:
    """The harmonic mean of precision and recall of words. `empty`: SQuAD 2.0's rule, by which two
    answers without a word agree."""
    ours, theirs = normalized(guess).split(), normalized(gold).split()
    if empty and not (ours and theirs):
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.


def scores(
    questions: Sequence[Question], guesses: Sequence[str], null_odds: Sequence[float] | None,
) -> dict[str, float]:
    """EM and F1 in percent over the questions.

    With the null odds of a version 2.0, where a question can have no answer, also for those with
    one and those without, and the best that any threshold of the odds gives.
    """
    empty = null_odds is not None
    golds = [_golds(question, empty) for question in questions]
    em = np.array([max((exact(gold, guess) for gold in some), default=0.)
                   for some, guess in zip(golds, guesses)])
    overlap = np.array([max((f1(gold, guess, empty) for gold in some), default=0.)
                        for some, guess in zip(golds, guesses)])
    values = {'exact_match': 100 * float(em.mean()), 'f1': 100 * float(overlap.mean())}
    if null_odds is None:
        return values
    answerable = np.array([some != [''] for some in golds])
    for name, chosen in (('HasAns', answerable), ('NoAns', ~answerable)):
        if chosen.any():
            values |= {f'{name}_exact': 100 * float(em[chosen].mean()),
                       f'{name}_f1': 100 * float(overlap[chosen].mean())}
    return values


def best_thresholds(
    questions: Sequence[Question], guesses: Sequence[str], null_odds: Sequence[float],
) -> dict[str, float]:
    """The best EM and F1 in percent that some threshold gives, and that threshold; `guesses` are
    the best answers where one has to be given."""
    golds = [_golds(question, True) for question in questions]
    without = np.array([some == [''] for some in golds], float)
    order = np.argsort(null_odds, kind='stable')
    found = {}
    for name, measure in (('exact', exact), ('f1', lambda gold, guess: f1(gold, guess, True))):
        given = np.array([max(measure(gold, guess) for gold in some)
                          for some, guess in zip(golds, guesses)]) * (1 - without)
        # After k questions in the order of their odds have been answered.
        total = without.sum() + np.concatenate([[0], np.cumsum((given - without)[order])])
        best = int(np.argmax(total))
        found |= {f'best_{name}': 100 * float(total[best]) / len(questions),
                  f'best_{name}_threshold': float(np.asarray(null_odds)[order[best - 1]])
                  if best else float(np.asarray(null_odds)[order[0]]) - 1}
    return found


def _golds(question: Question, empty: bool) -> list[str]:
    """Texts that count as right; of a version 2.0 '' alone where there is none."""
    texts = [answer.text for answer in question.answers]
    if empty:
        texts = [text for text in texts if normalized(text)] or ['']
    return texts
