"""Applies a trained model to texts: python -m pkm_jax.predict FOLDER "The sky is [MASK]."

    python -m pkm_jax.predict bert-base-uncased "The capital of France is [MASK]."
    python -m pkm_jax.predict runs/bert_base_pkm --file=texts.txt > words.jsonl
    python -m pkm_jax.predict runs/squad "Who wrote it?" "It was written by Ada."
    python -m pkm_jax.predict runs/causal_pkm "In the beginning" --temperature=0.8 --top_p=0.95

FOLDER is a run, one of its checkpoints, a converted checkpoint or a Hugging Face BERT folder. The
output is what the model was trained for: words for masks, classes or numbers of texts and pairs,
answers to questions over contexts, labels of words, or the continuation of a prompt. Without texts
and --file they are read from standard input, one a line. Results come in the order of the texts: a
JSON object a line, or, on a terminal, text.

Guide: docs/inspection.md.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from pkm_jax.console import survive_any_console
from pkm_jax.models.causal import CausalConfig
from pkm_jax.prediction import labelling
from pkm_jax.prediction.continuation import Continue, Sampling
from pkm_jax.prediction.fill_mask import FillMask
from pkm_jax.prediction.interface import Predictor
from pkm_jax.prediction.texts import add_arguments, given
from pkm_jax.prediction.trained import open_trained
from pkm_jax.refusal import Refusal, ends
from pkm_jax.tasks.classification import TextClassification
from pkm_jax.tasks.question_answering import QuestionAnswering
from pkm_jax.tasks.token_classification import TokenClassification

# Options that one kind of model alone reads, with their values where they are not given.
OF_CAUSAL = {'temperature': 1., 'top_p': 1., 'seed': 0, 'max_new': 32}
OF_MASKS = {'top_k': 5}


def main(arguments: Sequence[str] | None = None) -> None:
    """Predicts what the command line asks for; what could not be is said on standard error."""
    survive_any_console()
    logging.set_verbosity(logging.ERROR)    # a head that is not known is no matter of a user's
    options = _parser().parse_intermixed_args(arguments)
    start = time.perf_counter()
    try:
        if options.batch < 1:
            raise Refusal(f'--batch={options.batch} must be 1 or more.')
        predictor = _predictor(options)
        texts = given(options.texts, options.file, predictor.fields)
        rows = _rows(options)
        results = predictor(texts, rows)
        form = options.format or ('text' if sys.stdout.isatty() else 'json')
        _write(results, predictor, form, rows, start)
    except BrokenPipeError:     # nobody reads on: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (Refusal, OSError) as error:
        raise ends(f'Not predicted: {error}') from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m pkm_jax.predict', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, 'a run, checkpoint or Hugging Face folder')
    add = parser.add_argument
    add('--format', choices=('json', 'text'), help='json, a line each; on a terminal text')
    add('--top_k', type=int, help='words for each mask (5)')
    add('--max_new', type=int, help='most tokens that continue a prompt (32)')
    add('--temperature', type=float, help='of draws (1); 0: always the likeliest token')
    add('--top_p', type=float, help='draw of the likeliest tokens of this probability (1: of all)')
    add('--seed', type=int, help='of draws (0)')
    return parser


def _predictor(options: argparse.Namespace) -> Predictor:
    """How the model in the folder is used: by its kind and its heads."""
    trained = open_trained(options.folder)
    if isinstance(trained.config, CausalConfig):
        own = _own(options, OF_CAUSAL, OF_MASKS, 'a causal model')
        return Continue(trained, Sampling(own['temperature'], own['top_p'], own['seed']),
                        own['max_new'])
    task = trained.task
    if isinstance(task, TextClassification | QuestionAnswering | TokenClassification):
        _own(options, {}, OF_MASKS | OF_CAUSAL, f'a BERT for {type(task).__name__}')
        return labelling.predictor(trained, task)
    own = _own(options, OF_MASKS, OF_CAUSAL, 'a BERT')
    return FillMask(trained, own['top_k'])


def _own(options, own, others, kind) -> dict[str, Any]:
    """Options that a kind of model reads; refuses those of others, which would do nothing."""
    if foreign := [f'--{name}' for name in others if getattr(options, name) is not None]:
        raise Refusal(f'Leave out {" and ".join(foreign)}: {options.folder} is {kind}.')
    return {name: default if (value := getattr(options, name)) is None else value
            for name, default in own.items()}


def _rows(options: argparse.Namespace) -> int:
    """Texts of a batch: no more than there are, and each at once where they are typed."""
    if options.texts:
        return min(options.batch, len(options.texts))
    return 1 if not options.file and sys.stdin.isatty() else options.batch


def _write(results: Iterator[dict[str, Any]], predictor: Predictor, form: str,
           rows: int, start: float) -> None:
    """Prints each result when it is there; at the end, what was cut off and how long it took."""
    first, count = start, 0
    for count, result in enumerate(results, 1):
        first = time.perf_counter() if count == 1 else first
        print(predictor.readable(result) if form == 'text'
              else json.dumps(result, ensure_ascii=False), flush=True)
    seconds, tally = time.perf_counter() - start, predictor.tally
    tally.print_truncated(count)
    waited = first - start
    then = f'; then {(count - rows) / (seconds - waited):,.0f} texts/s' if count > rows else ''
    print(f'{count:,} texts of {tally.tokens:,} tokens in {seconds:.1f} s, {waited:.1f} s of it '
          f'until the first results (loading, compiling){then}.', file=sys.stderr)


if __name__ == '__main__':
    main()
