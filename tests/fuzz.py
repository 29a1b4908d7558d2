"""Files that nobody wrote, for every reader of files of others: python -m tests.fuzz --inputs 100000

Valid files are damaged at random, in their bytes and in what those mean (JSON, members of an
archive, what is compressed). A reader may use such a file or refuse it. Everything else is a
finding: another exception, more than 5 seconds, more than 1 GB of memory, a crash, and whatever
runs or writes anything. What was found is kept in --keep, by the number of its input: --only READER
--first NUMBER --inputs 1 gives it again. The exit status is 1 where there is a finding.
"""

import argparse
import copy
import gzip
import io
import json
import lzma
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from absl import logging

from pkm_jax.convert import configuration, foreign
from pkm_jax.convert.tensors import flatten
from pkm_jax.convert.weights import open_state_dict, open_weights
from pkm_jax.data import dataset, text_files, tokenizer
from pkm_jax.data.corpus import Counts
from pkm_jax.data.files import ContentHashes
from pkm_jax.data.vocabulary import word_pieces
from pkm_jax.refusal import Refusal

GOLDENS = Path(__file__).parent / 'convert/goldens'
SECONDS, BYTES = 5., 10 ** 9
AT_ONCE = 20_000    # inputs of a process
SILENT = 60.        # seconds without a new input after which a process is ended
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', '##c', 'schön', '東']
TEXT = 'a line\r\nschön 東\n\n\x0b a line\n'.encode() * 3
LINES = b'{"text": "a line"}\n{"text": "sch\\u00f6n \\ud83d\\ude42"}\n{"id": 1, "text": "x\\ny"}\n'
# Numbers and words that readers trip over.
NUMBERS = [0, -1, 1, 255, 2 ** 15, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63 - 1, 2 ** 64 - 1]
ODD: list[Any] = [None, True, False, -1, 0, 10 ** 6, 2 ** 70, 1e308, float('nan'), float('inf'), '',
                  'x' * 300, '../../x', '/etc/passwd', '\ud800', '\0', [], {}, [[]], {'': {}}, 0.5]
# What Python does on the way to running or changing something (sys.addaudithook).
FORBIDDEN = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'os.remove',
             'os.rename', 'os.mkdir', 'os.rmdir', 'os.chmod', 'os.link', 'os.symlink', 'socket.',
             'shutil.', 'ctypes.dlopen', 'os.putenv', 'os.kill', 'signal.pthread_kill')


class Reader(NamedTuple):
    """The name that an input is written under, valid ones, what damages them, and what reads them.

    `beside` are files that lie in the same folder.
    """
    file: str
    valid: list[bytes]
    damage: Callable[[Random, bytes], bytes]
    read: Callable[[Path], Any]
    beside: dict[str, bytes] = {}


def damaged(random: Random, content: bytes) -> bytes:
    """Bytes changed, put in, left out, repeated or cut off in some places, oftener near the ends."""
    content = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 4, 16])):
        size = len(content)
        near = random.choice([size, size, 64, 1024])
        place = random.randrange(min(size, near) + 1)
        place = size - place if random.random() < .3 else place
        length = random.choice([1, 1, 2, 4, 8, 64])
        match random.randrange(7):
            case 0 if place < size:
                content[place] ^= 1 << random.randrange(8)
            case 1:
                content[place:place + length] = random.randbytes(length)
            case 2:
                content[place:place] = random.randbytes(length)
            case 3:
                del content[place:place + length]
            case 4:
                number = random.choice(NUMBERS) + random.choice([0, 0, 1, -1])
                width = random.choice([1, 2, 4, 8])
                content[place:place + width] = (number % 2 ** (8 * width)).to_bytes(
                    width, random.choice(['little', 'big']))
            case 5:
                content[place:place] = content[place:place + length] * random.choice([1, 2, 50])
            case _ if random.random() < .3:
                del content[place:]
    return bytes(content)


def altered(random: Random, content: bytes) -> bytes:
    """A JSON file with values, at any depth, replaced by odd ones, left out, or put elsewhere."""
    if random.random() < .3:
        return damaged(random, content)
    whole = json.loads(content)
    for _ in range(random.choice([1, 1, 2, 5])):
        inner = whole
        while isinstance(inner, (dict, list)) and inner:
            key = random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if isinstance(inner[key], (dict, list)) and inner[key] and random.random() < .75:
                inner = inner[key]
                continue
            match random.randrange(4):
                case 0:
                    del inner[key]
                case 1 if isinstance(inner, dict):
                    inner[random.choice([*inner, 'x'])] = inner.pop(key)
                case _:
                    inner[key] = copy.deepcopy(random.choice(
                        [*ODD, whole.get(random.choice([*whole, ''])), random.randrange(100)]))
            break
    return json.dumps(whole).encode()


def compressed(compress: Callable, decompress: Callable) -> Callable[[Random, bytes], bytes]:
    """Damages what is compressed, or the archive."""
    def damage(random, content):
        if random.random() < .3:
            return compress(damaged(random, decompress(content)))
        return damaged(random, content)

    return damage


def rezipped(random: Random, content: bytes) -> bytes:
    """Damages one member of a ZIP archive, its name, how it is stored, or the archive."""
    if random.random() < .3:
        return damaged(random, content)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, 'w') as target:
        names = source.namelist()
        chosen = next(name for name in names if name.endswith('data.pkl'))
        chosen = random.choice([chosen, chosen, random.choice(names)])
        for name in names:
            member, how = source.read(name), zipfile.ZIP_STORED
            if name == chosen:
                match random.randrange(6):
                    case 0:
                        name = random.choice(['../' + name, '/tmp/' + name, name + '\\..', 'x'])
                    case 1:
                        how = zipfile.ZIP_DEFLATED
                        member += bytes(random.choice([0, 10 ** 6]))
                    case _:
                        member = damaged(random, member)
            target.writestr(name, member, how)
    return made.getvalue()


def _text(path: Path) -> None:
    text = text_files.text_files([str(path)], ContentHashes(path.parent / 'none'))
    for line in text.paragraphs(Counts()):
        line.encode()


def _vocabulary(path: Path) -> None:
    vocabulary = tokenizer.load(path.parent, log=lambda _: None)
    vocabulary.tokenizer().encode('a bc schön 東')
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) > vocabulary.mask_id


def _tensors(path: Path) -> None:
    for tensor in open_state_dict(path).values():
        assert tensor.read().shape == tensor.shape


def _prepared(path: Path) -> None:
    prepared = dataset.open_prepared(path.parent)
    for split in ('train', 'validation'):
        prepared.records(split).__getitems__(range(min(prepared.num_records(split), 3)))


def readers() -> dict[str, Reader]:
    """All readers of files that come from elsewhere, by name."""
    words, file = '\n'.join(WORDS).encode(), lambda name: (GOLDENS / name).read_bytes()
    pieces = json.loads(word_pieces(WORDS).description)
    settings = {'do_lower_case': True, 'strip_accents': False, 'mask_token': '[MASK]',
                'tokenizer_class': 'BertTokenizer', 'cls_token': {'content': '[CLS]'},
                'added_tokens_decoder': {'10': {'content': 'x', 'special': True}}}
    whole = {path.name: path.read_bytes() for path in (GOLDENS / 'memory_added').iterdir()
             if path.suffix in ('.json', '.safetensors')}
    shards = {path.name: path.read_bytes() for path in (GOLDENS / 'question_answering').iterdir()
              if path.suffix != '.npz'}
    index = 'model.safetensors.index.json'
    return {
        'txt': Reader('a.txt', [TEXT, '﻿ab\n東'.encode('utf-16')], damaged, _text),
        'jsonl': Reader('a.jsonl', [LINES], damaged, _text),
        'gz': Reader('a.txt.gz', [gzip.compress(TEXT)],
                     compressed(gzip.compress, gzip.decompress), _text),
        'xz': Reader('a.jsonl.xz', [lzma.compress(LINES), lzma.compress(LINES) * 2],
                     compressed(lzma.compress, lzma.decompress), _text),
        'vocab.txt': Reader('vocab.txt', [words], damaged, _vocabulary),
        'tokenizer.json': Reader('tokenizer.json', [json.dumps(pieces).encode()], altered,
                                 _vocabulary),
        'tokenizer_config.json': Reader('tokenizer_config.json', [json.dumps(settings).encode()],
                                        altered, _vocabulary, {'vocab.txt': words}),
        'config.json': Reader('config.json', [file('memory_added/config.json'),
                                              file('masked_lm/config.json')], altered,
                              configuration.read),
        'safetensors': Reader('model.safetensors', [file('model_without_pooler/model.safetensors')],
                              damaged, _tensors),
        'index of shards': Reader(index, [shards.pop(index)], altered,
                                  lambda path: open_weights(path.parent), shards),
        'pickle': Reader('pytorch_model.bin', [file('masked_lm/pytorch_model.bin')], rezipped,
                         _tensors),
        'pickle before 1.6': Reader('pytorch_model.bin', [file('pretraining/pytorch_model.bin')],
                                    damaged, _tensors),
        'folder': Reader('config.json', [whole.pop('config.json')], altered, lambda path: [
            array.sum() for array in flatten(foreign.load(path.parent).params).values()], whole),
    }


class Watched:
    """Notes what a reader does that no reader may, and ends what takes too long."""

    def __init__(self, folder: Path):
        self.seen: list[str] = []
        self._active, self._folder = False, str(folder)
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGALRM, self._too_long)

    def __enter__(self) -> 'Watched':
        self.seen = []
        signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)      # again: a callback may swallow it
        self._active = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._active = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _hear(self, event, arguments):
        if self._active and (event.startswith(FORBIDDEN) or event == 'open' and _writes(arguments)):
            self.seen.append(f'{event} {arguments!r:.200}')

    def _too_long(self, *_):
        raise TimeoutError(f'more than {SECONDS} s')


def _writes(arguments):
    _, mode, flags = arguments
    return any(letter in (mode or '') for letter in 'wax+') or flags & 3 if mode else False


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_reader(name: str, first: int, inputs: int, folder: Path, keep: Path) -> dict[str, Any]:
    """Counts of what became of the inputs `first` … of a reader; what was found is kept."""
    logging.set_verbosity(logging.ERROR)
    reader, watched = readers()[name], Watched(folder)
    for other, content in reader.beside.items():
        (folder / other).write_bytes(content)
    path, counts, found = folder / reader.file, Counter(), []
    path.write_bytes(reader.valid[0])
    with watched:
        reader.read(path)           # what is valid is read, and imports what it needs
    most = _most_memory() + BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (8 * BYTES, resource.RLIM_INFINITY))   # of the machine
    for number in range(first, first + inputs):
        random = Random(f'{name} {number}')
        path.write_bytes(reader.damage(random, random.choice(reader.valid)))
        (folder / 'number').write_text(str(number))
        outcome = 'read'
        try:
            with watched:
                reader.read(path)
        except Refusal:
            outcome = 'refused'
        except BaseException as error:      # whatever else it may be is what is looked for
            outcome = type(error).__name__
            found.append((number, ''.join(traceback.format_exception(error, limit=-4))))
        if _most_memory() > most:
            sys.exit(f'{name}, input {number}: more than {BYTES:,} bytes')
        if watched.seen:
            outcome = 'did what no reader may'
            found.append((number, '\n'.join(watched.seen)))
        counts[outcome] += 1
        if outcome not in ('read', 'refused') and counts[outcome] <= 5:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / f'{name.replace(" ", "_")}-{number}-{reader.file}')
            print(f'{name}, input {number}: {found[-1][1]}', file=sys.stderr, flush=True)
    return dict(counts)


def in_process(name: str, first: int, inputs: int, keep: Path) -> dict[str, int]:
    """`try_reader` in a process of its own, begun again after an input that makes it crash."""
    total, end = Counter(), first + inputs
    while first < end:
        with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as at:
            child = subprocess.Popen(
                [sys.executable, '-m', 'tests.fuzz', '--child', at, '--only', name, '--first',
                 str(first), '--inputs', str(min(end - first, AT_ONCE)), '--keep', str(keep)],
                stdout=subprocess.PIPE, text=True)
            number = Path(at) / 'number'
            number.write_text(str(first))
            while child.poll() is None:
                if time.time() - number.stat().st_mtime > SILENT:
                    child.kill()
                time.sleep(.05)
            if child.returncode == 0:
                total.update(json.loads(child.stdout.read().splitlines()[-1]))
                first += min(end - first, AT_ONCE)
                continue
            last = int(number.read_text())
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(at) / readers()[name].file, keep / f'{name}-{last}-crash')
            print(f'{name}, input {last}: exit status {child.returncode}', file=sys.stderr)
            total.update({'crash': 1, 'before a crash': last - first})
            first = last + 1
    return dict(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--inputs', type=int, default=13_000, help='of all readers together')
    parser.add_argument('--only', default='', help='one reader')
    parser.add_argument('--first', type=int, default=0, help='number of the first input')
    parser.add_argument('--keep', type=Path, default=Path('runs/fuzz'))
    parser.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(try_reader(options.only, options.first, options.inputs, options.child,
                                    options.keep)))
        return
    names = [options.only] if options.only else list(readers())
    bad = 0
    for name in names:
        start = time.monotonic()
        counts = in_process(name, options.first, -(-options.inputs // len(names)), options.keep)
        others = {kind: count for kind, count in counts.items() if kind not in ('read', 'refused', 'before a crash')}
        bad += sum(others.values())
        print(f'{name:22} {sum(counts.values()):>9,} inputs, {counts.get("read", 0):>9,} read, '
              f'{counts.get("refused", 0):>9,} refused, {sum(others.values()):>5,} findings '
              f'{others or ""} in {time.monotonic() - start:,.0f} s', flush=True)
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
