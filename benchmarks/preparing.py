"""How fast text becomes records of tokens, by the number of processes that cut it.

    python -m benchmarks.preparing [--megabytes=100] [--workers=1,4,16]

The text is that which comes with the program, its words shuffled within paragraphs until there is
as much as asked for; the vocabulary is trained on it. Of each number of workers megabytes a second
of tokenising, packing and writing; what this process alone does of it, which bounds the speed
however many workers there are, by its processor time; and the hash of the records, which must be
one and the same.
"""

import argparse
import lzma
import random
import tempfile
import time
from pathlib import Path

from pkm_jax.data import packing, vocabulary
from pkm_jax.data.corpus import Counts, Splits
from pkm_jax.data.dataset import SHIPPED
from pkm_jax.data.files import ContentHashes
from pkm_jax.data.text_files import text_files
from pkm_jax.data.workers import workers_for


def write_text(path: Path, size: int) -> None:
    """As many bytes of different paragraphs."""
    with lzma.open(SHIPPED['state-of-the-union'], 'rt', encoding='utf-8') as source:
        paragraphs = [line.split() for line in source]
    draw = random.Random(0)
    with path.open('w', encoding='utf-8') as file:
        while file.tell() < size:
            for words in paragraphs:
                file.write(' '.join(words) + '\n')
                draw.shuffle(words)


def prepared(text, words, workers: int) -> tuple[float, float, str]:
    """Seconds, those of this process's processors, and the records' fingerprint."""
    facts: dict = {}
    start, own = time.perf_counter(), time.process_time()
    paragraphs = Splits(0.01).assign(text.paragraphs(Counts()))
    with tempfile.TemporaryDirectory() as folder:
        packing.write_records(Path(folder), paragraphs, words, 128, facts, workers)
    return time.perf_counter() - start, time.process_time() - own, facts['fingerprint']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--megabytes', type=float, default=100)
    parser.add_argument('--workers', default='')
    options = parser.parse_args()
    cores = workers_for(None)
    numbers = ([int(number) for number in options.workers.split(',')] if options.workers else
               sorted({1, max(cores // 2, 1), cores}))
    with tempfile.TemporaryDirectory() as folder:
        path, found = Path(folder) / 'text.txt', set()
        write_text(path, int(options.megabytes * 1e6))
        size, text = path.stat().st_size / 1e6, text_files(str(path), ContentHashes(Path(folder)))
        start = time.perf_counter()
        words = vocabulary.train(text.paragraphs(Counts()), 30_522, log=lambda line: None)
        print(f'{size:.0f} MB on {cores} cores; a vocabulary in {time.perf_counter() - start:.1f} s'
              '\n\n| workers | MB/s | at most, by this process alone | records |\n'
              '| --- | --- | --- | --- |', flush=True)
        for number in numbers:
            seconds, own, fingerprint = prepared(text, words, number)
            found.add(fingerprint)
            print(f'| {number} | {size / seconds:.1f} | {size / own:.1f} | {fingerprint} |',
                  flush=True)
    if len(found) > 1:
        raise SystemExit('the records differ')


if __name__ == '__main__':
    main()
