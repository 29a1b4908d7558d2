"""Shows which slots fire for which words: python -m pkm_jax.inspect FOLDER --file=texts.txt

    python -m pkm_jax.inspect runs/bert_base_pkm --file=texts.txt
    python -m pkm_jax.inspect exported "A text to look at." --to=look
    python -m pkm_jax.inspect runs/bert_base_pkm --file=texts.txt.xz --slots_shown=10000

Writes inspect.html, a page of its own on which words show their slots and slots their words, and
slots.npz, the same as arrays. FOLDER is a run, one of its checkpoints or a Hugging Face folder,
with a memory. The use of main memory does not grow with the file.

Guide: docs/inspection.md. The arrays: pkm_jax/inspection/arrays.py.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from pkm_jax.checkpoints.pretrained import run_of
from pkm_jax.console import survive_any_console
from pkm_jax.data.files import expand
from pkm_jax.inspection.arrays import write_arrays
from pkm_jax.inspection.page import write_page
from pkm_jax.inspection.survey import survey
from pkm_jax.prediction.texts import Fields, add_arguments, given
from pkm_jax.prediction.trained import open_trained
from pkm_jax.refusal import Refusal, ends


def main(arguments: Sequence[str] | None = None) -> None:
    """Looks at what the command line names, and prints where the page and the arrays are."""
    survive_any_console()
    logging.set_verbosity(logging.ERROR)
    options = _parser().parse_intermixed_args(arguments)
    try:
        for name in ('batch', 'texts_shown', 'slots_shown'):
            if getattr(options, name) < 1:
                raise Refusal(f'--{name}={getattr(options, name)} must be 1 or more.')
        look(options)
    except (Refusal, OSError) as error:
        raise ends(f'Not inspected: {error}') from error


def look(options: argparse.Namespace) -> None:
    """Reads the texts and writes both files.

    Raises:
      Refusal: the model has no memory, or there is no text.
    """
    start = time.perf_counter()
    found = survey(open_trained(options.folder), given(options.texts, options.file, Fields()),
                   shown_texts=options.texts_shown, shown_slots=options.slots_shown,
                   rows=options.batch)
    folder = Path(expand(options.to or run_of(Path(options.folder)) / 'inspection'))
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(options.file).name if options.file else 'the texts given'
    write_page(found, folder / 'inspect.html', source, options.slots_shown)
    write_arrays(found, folder / 'slots.npz')
    found.tally.print_truncated(found.texts)
    print(f'{found.texts:,} texts of {found.tally.tokens:,} tokens in '
          f'{time.perf_counter() - start:.1f} s.', file=sys.stderr)
    print(folder / 'inspect.html', folder / 'slots.npz', sep='\n')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m pkm_jax.inspect', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, 'a run, checkpoint or Hugging Face folder with a memory')
    add = parser.add_argument
    add('--to', default='', help='folder to write to (inspection in the folder of the run)')
    add('--texts_shown', type=int, default=30, help='first texts, which the page shows (30)')
    add('--slots_shown', type=int, default=3000,
        help='slots of each memory, those read most, with their words and contexts (3000)')
    return parser


if __name__ == '__main__':
    main()
