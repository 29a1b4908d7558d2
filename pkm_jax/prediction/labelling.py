"""Texts through the tasks that models were fine-tuned on: their forward pass, without labels."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from tokenizers.pre_tokenizers import BertPreTokenizer

from pkm_jax.data.squad import Question
from pkm_jax.data.windows import Window, windows
from pkm_jax.data.words import Words, encode_words
from pkm_jax.prediction.batches import SHORTEST, Encoded, Shapes, TokenBatch, in_order
from pkm_jax.prediction.cutting import Tally, cut_as_in_training
from pkm_jax.prediction.texts import Fields, Text
from pkm_jax.prediction.trained import Trained
from pkm_jax.tasks import answers
from pkm_jax.tasks.classification import Classification
from pkm_jax.tasks.entities import are_entities, entities
from pkm_jax.tasks.glue import Glue
from pkm_jax.tasks.question_answering import QuestionAnswering
from pkm_jax.tasks.token_classification import TokenClassification

Outputs = dict[str, Any]     # arrays of a text, as its task names them


class _Forward:
    """What a task's forward pass says of each text, in order."""

    def __init__(self, trained: Trained, task: Any):
        self._trained = trained
        self._lengths = {'max_length': task.length, 'shortest': (*task.buckets, SHORTEST)[0]}
        self._program = jax.jit(functools.partial(_outputs, trained.graph, task))

    def __call__(
        self, texts: Iterable[Text], encode: Callable[[Sequence[Text]], list], rows: int,
    ) -> Iterator[tuple[Any, Outputs]]:
        shapes = Shapes(rows, **self._lengths)
        return in_order(texts, encode, shapes, self._trained.vocabulary.pad_id, self._run)

    def _run(self, batch: TokenBatch, texts: Sequence[Encoded]) -> Callable[[], list[Outputs]]:
        found = self._program(self._trained.state, batch)

        def wait() -> list[Outputs]:
            arrays = {name: np.asarray(array) for name, array in found.items()}
            return [{name: array[row] for name, array in arrays.items()}
                    for row in range(len(texts))]
        return wait


class Classify:
    """Classes of texts or pairs, or a number for each, by the classifier of a BERT."""

    def __init__(self, trained: Trained, task: Classification | Glue):
        self._vocabulary, self._task = trained.vocabulary, task
        self.tally = Tally(task.length)
        names = tuple(name for name in (task.text, task.text_pair) if name)
        # A model of others does not say whether it takes single texts or pairs.
        known = isinstance(task, Glue) or task.train
        self.fields = Fields(names, len(names) if known else 1)
        self._forward = _Forward(trained, task)

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """{'text', 'prediction', 'probabilities'} of each text; of a number no probabilities."""
        encode = functools.partial(cut_as_in_training, self._vocabulary, tally=self.tally)
        for text, outputs in self._forward(texts, encode, rows):
            said = self._task.said(outputs['logits'].astype(np.float64))
            yield {'text': text.text, **said}

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people: what is predicted, then the text."""
        said = result['prediction']
        if isinstance(said, float):
            return f'{said:8.3f}  {result["text"]}'
        names = [said] if isinstance(said, str) else said
        shares = ', '.join(f'{name} {result["probabilities"][name]:.1%}' for name in names)
        return f'{shares or "none"}  {result["text"]}'


@dataclasses.dataclass(frozen=True)
class Asked(Encoded):
    """A window over the context of a question, which has a number among all."""
    number: int = 0
    question: tuple[str, ...] = ()      # and its context
    window: Window | None = None


class Answer:
    """Answers to questions, as spans of their contexts, by the span head of a BERT.

    A context of any length is looked at in windows, as in training.
    """
    fields = Fields(('question', 'context'), 2)

    def __init__(self, trained: Trained, task: QuestionAnswering):
        self._vocabulary, self._task, self._count = trained.vocabulary, task, 0
        self.tally = Tally(task.length)
        self._forward = _Forward(trained, task)

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """{'question', 'context', 'answer', 'probability', 'candidates'} of each; an answer is ''
        where a model that was trained on questions without one finds none."""
        task = self._task
        threshold = task.null_threshold if task.unanswerable else None
        looked_at = self._forward(texts, self._encode, rows)
        for _, group in itertools.groupby(looked_at, lambda pair: pair[0].number):
            pairs = list(group)
            question, context = pairs[0][0].question
            best, = answers.n_best(
                [Question('', question, context, (), '')],
                [asked.window._replace(number=0) for asked, _ in pairs],
                {name: np.stack([outputs[name] for _, outputs in pairs]) for name in pairs[0][1]},
                task.n_best, task.longest_answer)
            answer = best.answer(threshold)
            yield {'question': question, 'context': context, 'answer': answer,
                   'probability': best.candidates[0].probability if answer else 0.,
                   'candidates': [one._asdict() for one in best.candidates[:5]]}

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people: the question and its answer."""
        answer = f'{result["answer"]}  ({result["probability"]:.1%})' if result['answer'] else (
            'no answer')
        return f'{result["question"]}\n  {answer}'

    def _encode(self, texts: Sequence[Text]) -> list[Asked]:
        questions, contexts = zip(*(text.parts for text in texts))
        found = windows(self._vocabulary, questions, contexts, self._task.length, self._task.stride)
        self.tally.tokens += sum(len(one.tokens.tokens) for one in found)
        first = self._count
        self._count += len(texts)
        return [Asked(questions[one.number], one.tokens.tokens.tolist(),
                      one.tokens.segments.tolist(), first + one.number, texts[one.number].parts,
                      one) for one in found]


@dataclasses.dataclass(frozen=True)
class Sentence(Encoded):
    """Some of the words of a text, which has a number among all."""
    number: int = 0
    words: tuple[str, ...] = ()         # of the whole text
    part: Words | None = None


class LabelWords:
    """A label for each word, by the token classifier of a BERT; words are parted at spaces and
    punctuation. A long text is looked at in parts, as in training."""
    fields = Fields()

    def __init__(self, trained: Trained, task: TokenClassification):
        self._vocabulary, self._task, self._count = trained.vocabulary, task, 0
        self.tally = Tally(task.length)
        self._forward = _Forward(trained, task)

    def __call__(self, texts: Iterable[Text], rows: int) -> Iterator[dict[str, Any]]:
        """{'text', 'words', 'labels'} of each text, and 'entities' where labels are of such."""
        looked_at = self._forward(texts, self._encode, rows)
        names = self._task.labels
        for _, group in itertools.groupby(looked_at, lambda pair: pair[0].number):
            pairs = list(group)
            words = pairs[0][0].words
            labels = [names[number] for sentence, outputs in pairs
                      for number in outputs['classes'][sentence.part.places]]
            found = {'text': pairs[0][0].text, 'words': list(words), 'labels': labels}
            if are_entities(names):
                found['entities'] = [
                    {'type': one.type, 'words': list(words[one.first:one.last + 1])}
                    for one in sorted(entities([labels]), key=lambda one: one.first)]
            yield found

    def readable(self, result: dict[str, Any]) -> str:
        """A result for people: the text, and its entities, or each word with its label."""
        if 'entities' in result:
            lines = [f'  {one["type"]:8}{" ".join(one["words"])}' for one in result['entities']]
            return '\n'.join([result['text'], *(lines or ['  no entity'])])
        return ' '.join(f'{word}/{label}' for word, label in zip(
            result['words'], result['labels']))

    def _encode(self, texts: Sequence[Text]) -> list[Sentence]:
        part = BertPreTokenizer().pre_tokenize_str
        words = [tuple(word for word, _ in part(text.content)) for text in texts]
        found = encode_words(self._vocabulary, words, self._task.length)
        self.tally.tokens += sum(len(one.tokens.tokens) for one in found)
        first = self._count
        self._count += len(texts)
        return [Sentence(texts[one.number].content, one.tokens.tokens.tolist(), (),
                         first + one.number, words[one.number], one) for one in found]


def predictor(trained: Trained, task: Any) -> Classify | Answer | LabelWords:
    """The way to use a model that was fine-tuned on `task`."""
    if isinstance(task, QuestionAnswering):
        return Answer(trained, task)
    if isinstance(task, TokenClassification):
        return LabelWords(trained, task)
    return Classify(trained, task)


def _outputs(
    graph: nnx.GraphDef, task: Any, state: tuple[dict, dict], batch: TokenBatch,
) -> dict[str, Array]:
    """The task's outputs of a batch, whose labels are blank: its loss is not looked at."""
    rows, length = batch.tokens.shape
    blank = {name: jnp.full((rows, *array.cut(length).shape), array.fill, array.dtype)
             for name, array in task.arrays.items()}
    outcome = task.outcome(nnx.merge(graph, *state), {**blank, **batch._asdict()},
                           deterministic=True)
    return outcome.outputs
