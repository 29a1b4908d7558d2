"""Text, tokenised and packed to full length once, and kept for all runs that ask for the same."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from etils import epath

from pkm_jax.data import tfds_text, tokenizer
from pkm_jax.data import vocabulary as vocabularies
from pkm_jax.data.corpus import Corpus, Counts, Splits
from pkm_jax.data.files import ContentHashes, expand, make_folder, read_json
from pkm_jax.data.packing import write_records
from pkm_jax.data.progress import progress_bar
from pkm_jax.data.text_files import text_files
from pkm_jax.data.vocabulary import Vocabulary
from pkm_jax.data.workers import workers_for
from pkm_jax.refusal import Refusal

FORMAT = 2                      # raise it when the same text would give other records
MANY_UNKNOWN = 0.05             # of the tokens: said as a warning
MOST_UNKNOWN = 0.5              # of the tokens: refused unless asked for
# Texts that come with the program, by name: texts/README.md.
SHIPPED = {'state-of-the-union': Path(__file__).parent / 'texts/state_of_the_union.txt.xz'}
_FILES = 'files.json'           # {file of a prepared folder: [size, SHA-256]}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset; `path` may be a gs:// directory.

    `fingerprint` is a hash of all records and the vocabulary, the same wherever and whenever they
    were prepared. Numbers of tokens are of real ones, [CLS] and [SEP] included; `unknown_share` is
    that of [UNK] among the others, and `unknown_words` the commonest behind it.
    """
    path: str
    fingerprint: str
    length: int
    vocab_size: int
    num_train: int
    num_validation: int
    train_tokens: int
    validation_tokens: int
    unknown_share: float
    unknown_words: list[str]

    @property
    def vocab_path(self) -> str:
        """The folder that holds the vocabulary used: tokenizer.json and tokenizer_config.json."""
        return self.path

    def num_records(self, split: str) -> int:
        """The number of records of 'train' or 'validation'."""
        return {'train': self.num_train, 'validation': self.num_validation}[split]

    def records(self, split: str) -> Sequence:
        """Random access to the records of a split: dicts of 'tokens', int32 of at most `length`."""
        return tfds.builder_from_directory(self.path).as_data_source(split)


def prepare(corpus: str | list[str], *, vocab: str = '', vocab_size: int = 30_522,
            lowercase: bool | None = None, strip_accents: bool | None = None,
            encoding: str = 'utf-8', allow_unknown: bool = False, length: int = 128,
            validation_fraction: float = 0.01, cache: str | os.PathLike = 'data',
            log: Callable[[str], None] = print) -> Prepared:
    """Returns the dataset of `corpus`, prepared in the folder `cache` unless it is there already.

    corpus: paths and globs of text files (.txt, .jsonl, also .gz and .xz), a list or with ','
        between; the name of a SHIPPED text; 'tfds:NAME'; or a directory that this function or TFDS
        prepared, local or gs://. `~` is expanded in all paths.
    vocab: '' trains a WordPiece vocabulary of `vocab_size` on the corpus; else a tokenizer.json, a
        vocab.txt, or a folder with one. See `tokenizer.load`.
    lowercase, strip_accents: how text is normalised. None: a trained vocabulary lowers capitals and
        keeps accents, a vocab.txt that does not say is guessed. What a tokenizer says itself cannot
        be changed.
    encoding: of text files that do not begin with a byte order mark.
    allow_unknown: goes on where more than half of the tokens are [UNK].
    length: tokens of a record, [CLS] and [SEP] included.
    validation_fraction: share of the text that is held out; at least one block of it.

    The folder appears whole or not at all. Its name holds a hash of the content of the text and of
    all of the above, so that other text or another vocabulary is prepared anew. A folder in the
    cache that was damaged is named, and prepared again.
    Raises:
      Refusal: an argument is wrong, before anything is written; the text cannot be read, is in
        another encoding, has a single paragraph, or too few words that the vocabulary knows.
    """
    if length < 8:
        raise Refusal(f'length is {length}: at least 8 tokens are needed, [CLS] and [SEP] included')
    if not 0 < validation_fraction < 1:
        raise Refusal(f'validation_fraction is {validation_fraction}: a share between 0 and 1 is '
                      'needed, such as 0.01')
    cache = Path(expand(cache))
    vocabulary = tokenizer.load(vocab, lowercase, strip_accents, log) if vocab else None
    hashes = ContentHashes(cache)
    text = _open_text(corpus, encoding, hashes)
    make_folder(cache, 'data.cache')
    if text is None:
        prepared = open_prepared(expand(str(corpus)), hashes)
        hashes.save()
        _check(prepared, vocabulary, length)
    else:
        log(f'text: {text.described}, content {_key(text.identity)}')
        if vocabulary is None:
            vocabulary = _trained_vocabulary(text, vocab_size, lowercase is not False,
                                             bool(strip_accents), cache, log)
        prepared = _find_or_write(text, vocabulary, length, validation_fraction, cache, hashes, log)
    _check_unknown(prepared, allow_unknown, log)
    log(f'data: {prepared.train_tokens:,} training tokens in {prepared.num_train:,} records of '
        f'{prepared.length}, {prepared.validation_tokens:,} validation tokens in '
        f'{prepared.num_validation:,}; vocabulary of {prepared.vocab_size:,}, '
        f'{prepared.unknown_share:.2%} of the tokens unknown; {prepared.path}')
    return prepared


def open_prepared(path: str | os.PathLike, hashes: ContentHashes | None = None) -> Prepared:
    """Opens a directory that `prepare` wrote, local or gs://.

    hashes: to compare the content of local files too.
    Raises:
      Refusal: it is of another kind, or a file is missing or not as it was written.
    """
    damage = _damage(path, None if '://' in os.fspath(path) else hashes)
    if damage and (epath.Path(path) / _FILES).exists():
        raise Refusal(f'{damage}: copy the folder again, or name its text as corpus to prepare it')
    facts = tfds_text.open_builder(path).info.metadata or {}
    names = {field.name for field in dataclasses.fields(Prepared)} - {'path'}
    if facts.get('format') != FORMAT or not names <= facts.keys():
        raise Refusal(f'{path} is a TFDS dataset, but not one of packed tokens that '
                      f'this version prepared (format {FORMAT}): name its text as corpus '
                      'to prepare it')
    if damage:
        raise Refusal(f'{damage} Copy the folder again, or name its text as corpus to prepare it')
    return Prepared(path=os.fspath(path), **{name: facts[name] for name in names})


def _open_text(corpus: str | list[str], encoding: str, hashes: ContentHashes) -> Corpus | None:
    """The text that `corpus` names, None where it names a directory of tokens."""
    if isinstance(corpus, str):
        if '://' in corpus or os.path.isdir(expand(corpus)):
            path = epath.Path(expand(corpus))
            if (path / 'dataset_info.json').exists():
                return tfds_text.directory(str(path), hashes)
            if '://' in corpus:
                raise Refusal(f'{corpus} is no prepared directory: it has no dataset_info.json')
        if corpus in SHIPPED:
            corpus = [str(SHIPPED[corpus])]
        elif corpus.startswith('tfds:'):
            return tfds_text.named(corpus.removeprefix('tfds:'), hashes)
    return text_files(corpus, hashes, encoding)


def _find_or_write(text: Corpus, vocabulary: Vocabulary, length: int, validation_fraction: float,
                   cache: Path, hashes: ContentHashes, log: Callable[[str], None]) -> Prepared:
    key = _key(text.identity, length, validation_fraction, vocabulary.description,
               dataclasses.astuple(vocabulary.special_tokens))
    folder = cache / f'{text.name}-{key}'
    if folder.exists() and (damage := _damage(folder, hashes)):
        log(f'data: {damage}; the text is prepared again')
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    if not folder.exists():
        _write_folder(folder, text, vocabulary, length, validation_fraction, log)
        _damage(folder, hashes)     # reads what was written once, to remember it
    hashes.save()
    return open_prepared(folder)


def _trained_vocabulary(text: Corpus, size: int, lowercase: bool, strip_accents: bool, cache: Path,
                        log: Callable[[str], None]) -> Vocabulary:
    """The vocabulary of a text, trained once and kept in the cache."""
    key = _key(text.identity, size, lowercase, strip_accents)
    folder = cache / f'{text.name}-{key}-vocabulary'
    if folder.exists():
        try:
            return tokenizer.load(folder)
        except Refusal as damage:
            log(f'vocabulary: {damage} It is trained again')
            shutil.rmtree(folder)
    paragraphs = _with_progress(text, Counts(), 'reading text for the vocabulary', log)
    vocabulary = vocabularies.train(paragraphs, size, lowercase, strip_accents, log)
    with _appearing(folder) as partial:
        vocabulary.save(partial)
    return vocabulary


def _key(*wanted) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *wanted]).encode()).hexdigest()[:16]


def _check(prepared: Prepared, vocabulary: Vocabulary | None, length: int) -> None:
    if prepared.length != length:
        raise Refusal(f'{prepared.path} holds records of {prepared.length} tokens, not '
                      f'{length}: set length to {prepared.length}, or prepare the text again')
    if vocabulary and vocabulary != tokenizer.load(prepared.vocab_path):
        raise Refusal(f'{prepared.path} was tokenised with another vocabulary than the one '
                      'asked for: leave vocab empty to use its own, or prepare the text again')


def _check_unknown(prepared: Prepared, allow_unknown: bool, log: Callable[[str], None]) -> None:
    """Warns where many words are unknown, refuses where most are."""
    share, words = prepared.unknown_share, ', '.join(map(repr, prepared.unknown_words))
    if share > MOST_UNKNOWN and not allow_unknown:
        raise Refusal(f'{share:.0%} of the tokens are [UNK], unknown words, most often {words}: '
                      'the vocabulary is not one for this text. Name another, train one on the '
                      'text (data.vocab empty), or set data.allow_unknown=True to go on')
    if share > MANY_UNKNOWN:
        log(f'WARNING: {share:.1%} of the tokens are [UNK], unknown words, most often {words}: '
            'a model learns nothing of them')


def _damage(folder: str | os.PathLike, hashes: ContentHashes | None = None) -> str:
    """The first file of a prepared folder that is not as it was written, and why; '' where all are.

    Compares sizes, and with `hashes` contents too.
    """
    place = epath.Path(folder)
    try:
        files = read_json(place / _FILES)
    except Refusal as refusal:
        return str(refusal)
    for name, state in files.items():
        path = place / name
        if not path.exists():
            return f'{path} is missing'
        if path.stat().length != state[0]:
            return f'{path} is damaged: it has {path.stat().length:,} bytes, not {state[0]:,}'
        if hashes and hashes.of(path) != state[1]:
            return f'{path} is damaged: its content is not what was written'
    return ''


def _write_folder(folder: Path, text: Corpus, vocabulary: Vocabulary, length: int,
                  validation_fraction: float, log: Callable[[str], None]) -> None:
    splits = Splits.plan(text.paragraphs(Counts()), validation_fraction)
    counts = Counts()
    paragraphs = splits.assign(_with_progress(text, counts, 'tokenising and packing', log))
    with _appearing(folder) as partial:
        vocabulary.save(partial)
        facts = dict(format=FORMAT, length=length, vocab_size=len(vocabulary.tokens))
        write_records(partial, paragraphs, vocabulary, length, facts, workers_for(text.size))
        hashes = ContentHashes(partial)
        files = {path.name: [path.stat().st_size, hashes.of(path)]
                 for path in sorted(partial.iterdir())}
        (partial / _FILES).write_text(json.dumps(files, indent=1))
        log(f'text: {counts.summary()}')


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which becomes it at the end, or is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f'{folder.name}.partial-', dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)        # mkdtemp makes it private
        if not folder.exists():     # another process may have been quicker, with the same result
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_progress(text: Corpus, counts: Counts, what: str,
                   log: Callable[[str], None]) -> Iterator[str]:
    """Yields the paragraphs of the corpus, and shows how much of it was read."""
    with progress_bar(what, text.size, 'B', log) as bar:
        for paragraph in text.paragraphs(counts):
            bar.update(counts.bytes_read - bar.n)
            yield paragraph
