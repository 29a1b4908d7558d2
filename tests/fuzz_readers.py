"""The readers of files that people did not write themselves, valid files, and what damages them."""

import copy
import csv
import gzip
import importlib.util
import io
import json
import lzma
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from pkm_jax.checkpoints import checksums
from pkm_jax.configs import quickstart
from pkm_jax.configuration import folder as run_folder
from pkm_jax.configuration import resolve
from pkm_jax.convert import configuration, foreign, tensorflow
from pkm_jax.convert.tensors import flatten
from pkm_jax.convert.weights import open_state_dict, open_weights
from pkm_jax.data import text_files, tokenizer
from pkm_jax.data.corpus import Counts
from pkm_jax.data.files import ContentHashes
from pkm_jax.data.vocabulary import word_pieces
from pkm_jax.refusal import Refusal
from pkm_jax.report import runs
from pkm_jax.tasks.classification import PROBLEMS, Classification
from pkm_jax.tasks.question_answering import QuestionAnswering
from pkm_jax.tasks.token_classification import TokenClassification
from pkm_jax.training.metrics_file import MetricsFile

GOLDENS = Path(__file__).parent / 'convert/goldens'
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'b', '##c', 'schön', '東']
TEXT = 'a line\r\nschön 東\n\n\x0b a line\n'.encode() * 3
LINES = b'{"text": "a line"}\n{"text": "sch\\u00f6n \\ud83d\\ude42"}\n{"id": 1, "text": "x\\ny"}\n'
# Numbers and words that readers trip over.
NUMBERS = [0, -1, 1, 255, 2 ** 15, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 63 - 1, 2 ** 64 - 1]
ODD: list[Any] = [None, True, False, -1, 0, 10 ** 6, 2 ** 70, 1e308, float('nan'), float('inf'), '',
                  'x' * 300, '../../x', '/etc/passwd', '\ud800', '\0', [], {}, [[]], {'': {}}, 0.5]


class Reader(NamedTuple):
    """The name that an input is written under, valid ones, what damages them, and what reads them.

    `beside` are files that lie in the same folder, in which one that `writes` may do so.
    """
    file: str
    valid: list[bytes]
    damage: Callable[[Random, bytes], bytes]
    read: Callable[[Path], Any]
    beside: dict[str, bytes] = {}
    writes: bool = False


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


def one_line(random: Random, content: bytes) -> bytes:
    """Lines of JSON of which one is altered, or is there twice, or not at all."""
    if random.random() < .3:
        return damaged(random, content)
    lines = content.splitlines(keepends=True)
    place = random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            del lines[place]
        case 1:
            lines.insert(random.randrange(len(lines)), lines[place])
        case _:
            lines[place] = altered(random, lines[place]).rstrip(b'\n') + b'\n'
    return b''.join(lines)


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


def _table(path: Path) -> None:
    """As each problem in turn, by the size of the file."""
    _labelled(Classification(train=str(path), length=16,
                             problem=PROBLEMS[path.stat().st_size % 3]), path.parent)


def _labelled(task: Any, vocabulary: Path) -> None:
    """What a task prepares of its files: sequences that fit, with targets that are numbers."""
    data = task.prepare(str(vocabulary), lambda _: None)
    for split in data.splits:
        for record in data.records(split):
            assert 0 < len(record['tokens']) <= task.length
            assert all(np.isfinite(value).all() for value in record.values())


def _metrics(path: Path) -> None:
    """As a run does that goes on at step 2: whole lines of before, none twice."""
    file = MetricsFile(path, 2, 1, {'lines': 4, 'sha256': 'that of other lines'})
    file.close()
    steps = [(line['kind'], line['step']) for line in map(json.loads, path.open())]
    assert len(set(steps)) == len(steps) and all(step <= 2 for _, step in steps)


def _described(path: Path) -> None:
    config = run_folder.read_description(path.parent)
    if 'model' not in config:
        raise Refusal('This is no run: it is read as a Hugging Face folder.')
    resolve.resolve(config)


def _reported(path: Path) -> None:
    for run in runs.read_runs(path.parent):
        assert run.placement in runs.PLACEMENTS and run.steps + run.tokens + run.planned_steps


def _goes_on(path: Path) -> None:
    run_folder.check_same_run(resolve.resolve(quickstart.get_config().to_dict()
                                              | {'workdir': str(path.parent)}))


def _checkpoint(path: Path) -> None:
    if found := checksums.damage(path.parent):
        raise Refusal('; '.join(found))
    assert json.loads(path.read_bytes()) == json.loads(_CHECKPOINT[path.name])


def _tensorflow(path: Path) -> None:
    for tensor in tensorflow.open_tensors(path.parent / 'bert_model.ckpt').values():
        assert tensor.read().shape == tensor.shape


def _parquet(**columns: Any) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), written)
    return written.getvalue()


def readers() -> dict[str, Reader]:
    """All readers of files that people did not write themselves, by name."""
    return {**_foreign(), **_of_labels(), **_of_runs(), **_of_tensorflow()}


def _foreign():
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


def _of_labels():
    vocabulary = {'vocab.txt': '\n'.join(WORDS).encode()}
    rows = [('a b', '0'), ('schön, "東"', '1'), ('a', '1'), ('b c', '0')]
    tsv = '\n'.join(map('\t'.join, [('text', 'label'), *rows])).encode()
    table = io.StringIO()
    csv.writer(table).writerows([('label', 'text'), *(row[::-1] for row in rows)])
    lines = ''.join(json.dumps({'text': text, 'label': int(label)}) + '\n'
                    for text, label in rows).encode()
    texts, labels = map(list, zip(*rows))
    parquets = [_parquet(text=texts, label=labels), _parquet(text=texts, label=[0, 1, 1, 0]),
                _parquet(text=texts, label=[.5, 1., None, 2.]),
                _parquet(text=texts, label=[['x'], [], ['x', 'y'], None])]
    squad = json.dumps({'version': '2', 'data': [{'title': 'x', 'paragraphs': [{
        'context': 'a b c schön a 東 b', 'qas': [
            {'id': '1', 'question': 'a b', 'is_impossible': False,
             'answers': [{'text': 'schön', 'answer_start': 6}]},
            {'id': '2', 'question': 'c', 'is_impossible': True, 'answers': []}]}]}]}).encode()
    words = '-DOCSTART- -X- O\n\na NN B-X\nb NN I-X\n\nschön JJ O\n東 NN B-Y\n'.encode()

    def questions(path):
        _labelled(QuestionAnswering(train=str(path), validation=str(path), length=16, stride=4,
                                    unanswerable=True), path.parent)

    return {
        '.tsv': Reader('a.tsv', [tsv], damaged, _table, vocabulary),
        '.csv': Reader('a.csv', [table.getvalue().encode()], damaged, _table, vocabulary),
        'labelled .jsonl': Reader('a.jsonl', [lines], one_line, _table, vocabulary),
        'Parquet': Reader('a.parquet', parquets, damaged, _table, vocabulary),
        'SQuAD': Reader('a.json', [squad], altered, questions, vocabulary),
        'SQuAD, gz': Reader('a.json.gz', [gzip.compress(squad)],
                            compressed(gzip.compress, gzip.decompress), questions, vocabulary),
        'SQuAD, xz': Reader('a.json.xz', [lzma.compress(squad)],
                            compressed(lzma.compress, lzma.decompress), questions, vocabulary),
        'CoNLL': Reader('a.txt', [words], damaged, lambda path: _labelled(TokenClassification(
            train=str(path), validation=str(path), length=16), path.parent), vocabulary),
    }


def _of_runs():
    config = json.dumps(resolve.described(resolve.resolve(
        quickstart.get_config().to_dict()))).encode()
    lines = [{'kind': 'start', 'step': 0, 'tokens': 0, 'time': 1., 'parameters': 9}]
    for step in 1, 2, 3:
        lines += [{'kind': kind, 'step': step, 'tokens': 8 * step, 'time': 2., 'loss': 1.5, **more}
                  for kind, more in (('train', {'norms': {}}), ('eval', {
                      'eval_tokens': 8, 'memory': {'1': {'top_1_usage': .5, 'k': 2, 'slots': 36}}}))]
    metrics = ''.join(json.dumps(line) + '\n' for line in lines).encode()
    counts = io.BytesIO()
    np.savez_compressed(counts, **{name: np.arange(36) for name in ('count', 'top1', 'mass')})
    return {
        'config.json of a run': Reader(
            'config.json', [config], altered,
            _described),
        'config.json, to go on': Reader('config.json', [config], altered, _goes_on),
        'config.json, to report': Reader('config.json', [config], altered,
                                      _reported,
                                      {'metrics.jsonl': metrics}),
        'metrics.jsonl': Reader('metrics.jsonl', [metrics], one_line, _metrics, writes=True),
        'metrics.jsonl, to report': Reader('metrics.jsonl', [metrics], one_line,
                                       _reported,
                                       {'config.json': config}),
        'counts of slots': Reader('slot_counts_1.npz', [counts.getvalue()], damaged,
                                  _reported,
                                  {'config.json': config, 'metrics.jsonl': metrics}),
        **{f'{name} of a checkpoint': Reader(
            name, [_CHECKPOINT[name]], altered, _checkpoint,
            {other: content for other, content in _CHECKPOINT.items() if other != name})
           for name in (checksums.METADATA, checksums.CHECKSUMS)},
    }


def _of_tensorflow():
    """Where TensorFlow is installed, whose own reader is used."""
    if not importlib.util.find_spec('tensorflow'):
        return {}
    whole = {path.name: path.read_bytes() for path in (GOLDENS / 'tensorflow').iterdir()
             if path.suffix != '.json'}
    return {f'TensorFlow, {what}': Reader(
        name, [whole[name]], damaged, _tensorflow,
        {other: content for other, content in whole.items() if other != name})
        for name in whole for what in [name.split('.')[-1].split('-')[0]]}


def _made_checkpoint() -> dict[str, bytes]:
    """The files of a finished checkpoint, in which no array is."""
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        (folder / checksums.METADATA).write_text(json.dumps(
            {'item_handlers': {'model': 'a'}, 'custom_metadata': checksums.PROMISED}))
        for name in (*checksums.MARKERS[1:], 'manifest.ocdbt'):
            (folder / name).write_bytes(name.encode())
        checksums.write(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


_CHECKPOINT = _made_checkpoint()
