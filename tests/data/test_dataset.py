import contextlib
import lzma
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pkm_jax.data import corpus as corpora
from pkm_jax.data import dataset, packing, tokenizer, worker, workers
from pkm_jax.data import vocabulary as vocabularies
from pkm_jax.data.corpus import Splits
from pkm_jax.data.packing import SPLITS, Packer
from pkm_jax.data.workers import Workers
from pkm_jax.refusal import Refusal

OPTIONS = dict(vocab_size=250, length=32, validation_fraction=0.2)


def body(records: list[np.ndarray]) -> list[int]:
    return [int(token) for record in records for token in record[1:-1]]


def added(packer, *paragraphs):
    """Records as lists, of the paragraphs' tokens given at once."""
    tokens = np.array([token for paragraph in paragraphs for token in paragraph], np.int32)
    return packer.add(tokens, np.array([len(part) for part in paragraphs], np.int32)).tolist()


@pytest.mark.parametrize('at_once', [1, 3, 8])
def test_packing_fills_every_record_and_loses_no_token(at_once):
    random = np.random.default_rng(0)
    paragraphs = [random.integers(5, 100, size).tolist() for size in [3, 1, 6, 25, 12, 5, 6, 4]]
    packer = Packer(length=8, cls=2, sep=3)
    full = [record for start in range(0, 8, at_once)
            for record in added(packer, *paragraphs[start:start + at_once])]
    records = full + packer.rest().tolist()
    assert all(len(record) == 8 for record in full)
    assert all(record[0] == 2 and record[-1] == 3 for record in records)
    assert [token for token in body(records) if token != 3] == sum(paragraphs, [])
    assert len(packer.rest()) == 0


def test_packing_puts_separators_between_paragraphs_only():
    for at_once in (False, True):
        packer = Packer(length=8, cls=2, sep=3)
        paragraphs = [10, 11], [], [12, 13, 14], [20]
        records = added(packer, *paragraphs) if at_once else [
            record for paragraph in paragraphs for record in added(packer, paragraph)]
        assert records + packer.rest().tolist() == [[2, 10, 11, 3, 12, 13, 14, 3], [2, 20, 3]]


def test_any_number_of_workers_writes_the_same(tmp_path, prepared, paragraphs, monkeypatch):
    """Processes that cut small batches, two of which are unlike in size, and none at all."""
    monkeypatch.setattr(packing, 'CHARACTERS_AT_ONCE', 3_000)
    monkeypatch.setattr(packing, 'RECORDS_PER_FILE', 100)
    vocabulary, written = tokenizer.load(prepared.vocab_path), []
    for number in (0, 1, 2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        packing.write_records(folder, Splits(0.2).assign(paragraphs), vocabulary, 32, {}, number)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(written[0]) > 4      # several files of records, and three of their description
    assert all(other == written[0] for other in written[1:])


def test_a_worker_that_ends_is_said_to_have(prepared, capfd):
    with contextlib.closing(Workers(tokenizer.load(prepared.vocab_path).description, 1)) as crew:
        with pytest.raises(RuntimeError, match='a process that prepares text ended with status 1'):
            crew.submit('no_such_function').result()
    assert 'no_such_function' in capfd.readouterr().err


def test_a_worker_that_dies_among_requests_is_said_to_have(prepared):
    """Closing says nothing of its own, though some of a request waits to be sent to the dead one."""
    with contextlib.closing(Workers(tokenizer.load(prepared.vocab_path).description, 1)) as crew:
        crew.submit('cut', ['text'], None).result()
        crew._processes[0].kill()
        found = [crew.submit('cut', ['x' * 700_000], None) for _ in range(3)]
        for one in found:
            with pytest.raises(RuntimeError, match=r'ended with status -9 \(-9: often'):
                one.result()


@pytest.mark.parametrize('quota, number', [('max 100000', 6), ('250000 100000', 2), ('90 1000', 1),
                                           ('9900000 100000', 6), ('', 6)])
def test_no_more_workers_than_processors(tmp_path, monkeypatch, quota, number):
    monkeypatch.setattr(workers.os, 'sched_getaffinity', lambda _: range(6), raising=False)
    monkeypatch.setattr(workers, 'QUOTA', tmp_path / 'cpu.max')
    (tmp_path / 'cpu.max').write_text(quota)
    assert workers.workers_for(None) == number == workers.workers_for(10 ** 9)
    assert workers.workers_for(1000) == 0


def test_what_is_serialised_is_read_back(prepared):
    """Numbers of one to five bytes, and none."""
    cutter = tokenizer.load(prepared.vocab_path).tokenizer()
    records = np.array([[0, 1, 127, 128, 16_383, 16_384, 2 ** 21, 2 ** 28 - 1, 2 ** 31 - 1]] * 2,
                       np.int32)
    features = tfds.features.FeaturesDict({'tokens': tfds.features.Tensor(
        shape=(None,), dtype=np.int32)})
    for one in (records, records[:, :0]):
        for example, record in zip(worker.serialised(cutter, one), one):
            np.testing.assert_array_equal(features.deserialize_example_np(example)['tokens'], record)


def test_all_text_is_in_the_records_of_exactly_one_split(prepared, paragraphs):
    vocabulary = tokenizer.load(prepared.vocab_path)
    ordinary = {split: [token for record in prepared.records(split)
                        for token in record['tokens'].tolist() if token not in (2, 3)]
                for split in SPLITS}
    expected = {split: [] for split in SPLITS}
    for split, paragraph in Splits(0.2).assign(paragraphs):
        expected[split] += vocabulary.tokenizer().encode(
            paragraph, add_special_tokens=False).ids
    assert ordinary == expected
    assert all(ordinary.values())


def test_the_numbers_reported_are_those_of_the_records(prepared):
    for split, tokens in [('train', prepared.train_tokens),
                          ('validation', prepared.validation_tokens)]:
        lengths = [len(record['tokens']) for record in prepared.records(split)]
        assert len(lengths) == prepared.num_records(split) and sum(lengths) == tokens
        assert set(lengths[:-1]) == {32}
    assert prepared.vocab_size == len(tokenizer.load(prepared.vocab_path).tokens) == 250


def test_the_second_call_reads_nothing(prepared, text_file, monkeypatch):
    monkeypatch.setattr(corpora.Corpus, 'paragraphs', None)
    cache = dataset.Path(prepared.path).parent
    assert dataset.prepare(str(text_file), **OPTIONS, cache=cache) == prepared
    assert dataset.prepare(prepared.path, length=32) == prepared


def test_other_text_or_settings_are_prepared_anew(tmp_path, paragraphs):
    text = tmp_path / 'text.txt'
    text.write_text('\n'.join(paragraphs[:400]))
    cache = tmp_path / 'cache'
    changes = [{}, {'length': 16}, {'vocab_size': 200}, {'validation_fraction': 0.3},
               {'lowercase': False}]
    prepared = [dataset.prepare(str(text), **{**OPTIONS, **change}, cache=cache)
                for change in changes]
    named = dataset.prepare(str(text), **OPTIONS, vocab=prepared[2].path, cache=cache)
    assert named == prepared[2] and named.vocab_size == 200     # the same words, nothing anew
    text.write_text('\n'.join(paragraphs[:399]))
    shorter = dataset.prepare(str(text), **OPTIONS, cache=cache)
    assert len({one.fingerprint for one in [*prepared, shorter]}) == 6
    assert len({one.path for one in [*prepared, shorter]}) == 6


def test_the_fingerprint_is_of_the_content_wherever_it_was_prepared(tmp_path, prepared, paragraphs):
    (tmp_path / 'copy.txt').write_text('\n'.join(paragraphs) + '\n\n')
    copy = dataset.prepare(str(tmp_path / 'copy.txt'), **OPTIONS, cache=tmp_path / 'cache')
    assert copy.fingerprint == prepared.fingerprint


def test_the_vocabulary_used_is_stored_beside_the_records(tmp_path, prepared, paragraphs):
    text = tmp_path / 'text.txt.xz'
    text.write_bytes(lzma.compress('\n'.join(paragraphs).encode()))
    other = dataset.prepare([str(text)], vocab=prepared.vocab_path, length=16,
                            validation_fraction=0.2, cache=tmp_path)
    assert tokenizer.load(other.vocab_path) == tokenizer.load(prepared.vocab_path)


def test_a_directory_of_other_length_or_vocabulary_is_refused(tmp_path, prepared, paragraphs):
    with pytest.raises(Refusal, match='records of 32 tokens, not 64'):
        dataset.prepare(prepared.path, length=64)
    vocabularies.train(paragraphs, 200).save(tmp_path)
    with pytest.raises(Refusal, match='another vocabulary'):
        dataset.prepare(prepared.path, length=32, vocab=str(tmp_path))
    assert dataset.prepare(prepared.path, length=32, vocab=prepared.vocab_path) == prepared


def test_a_directory_of_another_format_is_refused(prepared, monkeypatch):
    monkeypatch.setattr(dataset, 'FORMAT', 99)
    with pytest.raises(Refusal, match='not one of packed tokens that this version prepared'):
        dataset.open_prepared(prepared.path)


def test_a_failure_leaves_no_folder(tmp_path, text_file, monkeypatch):
    def fail(*_):
        raise OSError('disk full')
    monkeypatch.setattr(packing, 'packed', fail)
    with pytest.raises(OSError, match='disk full'):
        dataset.prepare(str(text_file), **OPTIONS, cache=tmp_path / 'cache')
    assert [path.name[-11:] for path in (tmp_path / 'cache').iterdir()] == ['-vocabulary']


def test_bad_input_is_refused_before_anything_is_written(tmp_path, text_file):
    cache = tmp_path / 'cache'
    with pytest.raises(Refusal, match='missing.txt'):
        dataset.prepare(str(tmp_path / 'missing.txt'), cache=cache)
    with pytest.raises(Refusal, match='length is 4'):
        dataset.prepare(str(text_file), length=4, cache=cache)
    with pytest.raises(Refusal, match='validation_fraction is 0.0'):
        dataset.prepare(str(text_file), validation_fraction=0.0, cache=cache)
    with pytest.raises(Refusal, match='no vocabulary'):
        dataset.prepare(str(text_file), vocab=str(tmp_path / 'none'), cache=cache)
    assert not cache.exists()


def test_progress_is_logged_in_plain_lines_without_a_terminal(tmp_path, text_file):
    lines = []
    prepared = dataset.prepare(str(text_file), **OPTIONS, cache=tmp_path, log=lines.append)
    assert any('tokenising and packing: 100%' in line for line in lines)
    assert any('1,000 paragraphs' in line for line in lines)
    assert prepared.path in lines[-1] and f'{prepared.train_tokens:,} training tokens' in lines[-1]


SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
LETTERS = [*SPECIAL, *'abcdefghijklmnopqrstuvwxyz0123456789',
           *(f'##{letter}' for letter in 'abcdefghijklmnopqrstuvwxyz0123456789')]
AMHARIC = 'ሰላም ኢትዮጵያ መጽሐፍ ቤት ውሃ'


@pytest.fixture
def letters(tmp_path):
    """A vocab.txt of Latin letters and digits."""
    (tmp_path / 'letters.txt').write_text('\n'.join(LETTERS))
    return str(tmp_path / 'letters.txt')


@pytest.fixture
def prepare(tmp_path):
    """Prepares lines of text in a cache of the test."""
    def run(lines, **options):
        text = tmp_path / 'given.txt'
        text.write_text('\n'.join(lines))
        options = dict(vocab_size=250, length=16, validation_fraction=0.2) | options
        return dataset.prepare(str(text), cache=tmp_path / 'cache', **options)
    return run


def test_a_text_without_a_token_to_predict_is_refused(prepare, letters):
    several = [f'{AMHARIC} {AMHARIC[:n]}' for n in range(1, 20)]
    for lines, allow in [(several, False), (several, True), ([AMHARIC] * 400, False)]:
        with pytest.raises(Refusal, match='no token of the train text can be predicted: 100% .*ሰላም'):
            prepare(lines, vocab=letters, allow_unknown=allow)


def test_unknown_words_are_counted_named_and_refused_where_they_are_most(prepare, letters):
    lines, mostly = [], [f'{AMHARIC} {n}' for n in range(10, 100)]
    with pytest.raises(Refusal, match=r'71% of the tokens are .UNK., .*ሰላም.*allow_unknown'):
        prepare(mostly, vocab=letters)
    allowed = prepare(mostly, vocab=letters, allow_unknown=True, log=lines.append)
    assert allowed.unknown_share == 5 / 7 and set(allowed.unknown_words) == set(AMHARIC.split())
    assert any(line.startswith('WARNING: 71.4% of the tokens') for line in lines)
    with pytest.raises(Refusal, match='71% of the tokens'):     # prepared already, and still refused
        prepare(mostly, vocab=letters)


@pytest.mark.parametrize('words, warned', [(1, False), (4, True)])
def test_a_share_of_unknown_words_is_a_warning(prepare, letters, words, warned):
    lines = []
    prepared = prepare([f'{AMHARIC.split()[0]} ' * words + 'a b c d e f g h i j k l m n o p q r s t '
                        f'u v w x {n}' for n in range(10, 200)], vocab=letters, log=lines.append)
    assert prepared.unknown_share == pytest.approx(words / (words + 26), rel=0.1)
    assert any('WARNING' in line and AMHARIC.split()[0] in line for line in lines) == warned


@pytest.mark.parametrize('number', [2, 5, 17, 600])
def test_a_small_text_is_split_into_two(prepare, number):
    prepared = prepare([f'one of some paragraphs, number {n}' for n in range(number)],
                       validation_fraction=0.01)
    assert prepared.num_train and prepared.num_validation


def test_a_single_paragraph_is_refused_with_the_true_reason(prepare):
    with pytest.raises(Refusal, match='has one paragraph.*give more text'):
        prepare(['one'] * 400)


def test_two_texts_of_the_same_names_sizes_and_times_are_two(tmp_path):
    prepared = []
    for folder, word in (('one', 'apple'), ('two', 'peach')):
        (tmp_path / folder).mkdir()
        text = tmp_path / folder / 'text.txt'
        text.write_text('\n'.join(f'{word} {n}' for n in range(100)))
        dataset.os.utime(text, (0, 0))
        prepared.append(dataset.prepare(str(text), **OPTIONS, cache=tmp_path / 'cache'))
    assert prepared[0].fingerprint != prepared[1].fingerprint
    assert prepared[0].path != prepared[1].path


def test_the_text_is_named_in_the_log(prepare):
    lines = []
    prepare([f'paragraph {n}' for n in range(50)], log=lines.append)
    assert any(line.startswith('text: given.txt (1 files, 0.0 MB), content ') for line in lines)


def damages(folder):
    """Every file of a prepared folder, and what may happen to it."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        yield path, content, content[:-1]
        yield path, content, b''
        yield path, content, None
        if len(content) > 2:
            yield path, content, content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


def test_prepared_text_that_was_damaged_is_named_and_prepared_again(prepare, tmp_path):
    lines = [f'a paragraph of the text, number {n}' for n in range(100)]
    whole = prepare(lines)
    folder = dataset.Path(whole.path)
    number = 0
    for path, _, damaged in damages(folder):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(Refusal, match=f'{path.name}|dataset_info.json|is a folder'):
            dataset.prepare(whole.path, length=16, cache=tmp_path / 'cache')
        said = []
        assert prepare(lines, log=said.append) == whole
        assert any(path.name in line and 'prepared again' in line for line in said), (path, said)
        number += 1
    assert number > 20
    shutil.rmtree(folder)
    folder.write_text('a file in its place')
    assert prepare(lines) == whole
    assert len(list((tmp_path / 'cache').iterdir())) == 3   # text, vocabulary, hashes


def test_a_cache_that_is_no_folder_is_refused(tmp_path, text_file):
    (tmp_path / 'file').write_text('')
    for cache in ('file', 'file/below'):
        with pytest.raises(Refusal, match='data.cache = .*file.* is no folder'):
            dataset.prepare(str(text_file), length=16, cache=tmp_path / cache)


def test_a_trained_vocabulary_that_was_damaged_is_trained_again(prepare, tmp_path):
    lines = [f'a paragraph of the text, number {n}' for n in range(100)]
    whole = prepare(lines)
    (folder,) = (tmp_path / 'cache').glob('*-vocabulary')
    (folder / 'tokenizer.json').write_text('{"cut')
    said = []
    assert prepare(lines, log=said.append) == whole
    assert any('tokenizer.json is damaged' in line and 'trained again' in line for line in said)


def test_a_tilde_is_expanded_in_every_path(tmp_path, monkeypatch, paragraphs):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'text.txt').write_text('\n'.join(paragraphs))
    prepared = dataset.prepare('~/text.txt', **OPTIONS, cache='~/cache')
    assert prepared.path.startswith(str(tmp_path / 'cache'))
    inside = '~' + prepared.path.removeprefix(str(tmp_path))
    assert dataset.prepare(inside, length=32, vocab=inside).fingerprint == prepared.fingerprint


def test_case_accents_and_encoding_are_settings(tmp_path):
    text = tmp_path / 'text.txt'
    text.write_bytes('\n'.join(f'Schöne Bücher {n}' for n in range(100)).encode('latin-1'))
    def tokens(**options):
        prepared = dataset.prepare(str(text), vocab_size=80, length=16, encoding='latin-1',
                                   cache=tmp_path / 'cache', **options)
        return {token for token in tokenizer.load(prepared.vocab_path).tokens if token in 'Ssöou'}
    assert {'s', 'ö'} <= tokens() and 'S' not in tokens()
    assert 'S' in tokens(lowercase=False) and 'ö' not in tokens(strip_accents=True)
    with pytest.raises(Refusal, match="data.encoding='cp1252'"):
        dataset.prepare(str(text), cache=tmp_path / 'cache')


def test_long_names_are_prepared(tmp_path):
    text = tmp_path / ('文' * 80 + '.txt')
    text.write_text('\n'.join(f'paragraph {n}' for n in range(50)))
    assert dataset.prepare(str(text), **OPTIONS, cache=tmp_path / 'cache').num_train
