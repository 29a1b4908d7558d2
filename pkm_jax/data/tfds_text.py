"""The text of datasets that TFDS knows or prepared."""

import importlib.util
import itertools
import os
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath

from pkm_jax.data.corpus import Corpus, Counts, bounded_lines, safe_name
from pkm_jax.data.files import ContentHashes
from pkm_jax.refusal import Refusal

_WIKI40B_MARKS = ('_START_ARTICLE_', '_START_SECTION_', '_START_PARAGRAPH_')


def named(name: str, hashes: ContentHashes) -> Corpus:
    """The text of a dataset of TFDS, such as 'wiki40b/en' or 'wikipedia/20230601.en'; its train
    split.

    Raises:
      Refusal: TensorFlow, which preparing these datasets needs, is missing, or there is no such
        dataset of text.
    """
    if importlib.util.find_spec('tensorflow') is None:
        raise Refusal(f"the corpus 'tfds:{name}' needs TensorFlow: pip install "
                      "'pkm-jax[tensorflow]', or name text files or an already prepared "
                      'directory instead')
    try:
        builder = tfds.builder(name)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise Refusal(f"the corpus 'tfds:{name}' is no dataset of TFDS ({error})") from error
    if not _has_text(builder):
        raise Refusal(f"the corpus 'tfds:{name}' has no field \"text\": its fields are "
                      f'{list(builder.info.features)}')
    builder.download_and_prepare()
    return _articles(builder, hashes)


def open_builder(path: str | os.PathLike) -> tfds.core.DatasetBuilder:
    """The dataset in a directory that TFDS prepared, local or gs://.

    Raises:
      Refusal: its description is damaged.
    """
    try:
        builder = tfds.builder_from_directory(path)
        _ = builder.info.metadata       # is read here, from a file of its own
        return builder
    except Exception as error:      # a damaged description can raise nearly anything
        raise Refusal(f'{path}: its dataset_info.json, features.json or metadata.json is damaged '
                      f'({error!r:.200}): copy '
                      'the folder again, or name its text as corpus to prepare it') from error


def directory(path: str, hashes: ContentHashes) -> Corpus | None:
    """The text of a directory that TFDS prepared, local or gs://; its train split. None where it
    holds no text.

    Raises:
      Refusal: it is damaged, or its files are not ArrayRecord and TensorFlow is missing.
    """
    builder = open_builder(path)
    if not _has_text(builder):
        return None
    if not random_access(builder) and importlib.util.find_spec('tensorflow') is None:
        raise Refusal(f'{path} holds {builder.info.file_format.value} files, which only '
                      "TensorFlow reads: pip install 'pkm-jax[tensorflow]', or prepare it with "
                      "file_format='array_record'")
    return _articles(builder, hashes)


def _has_text(builder: tfds.core.DatasetBuilder) -> bool:
    features = builder.info.features
    return 'text' in features and isinstance(features['text'], tfds.features.Text)


def _articles(builder: tfds.core.DatasetBuilder, hashes: ContentHashes) -> Corpus:
    if 'train' not in builder.info.splits:
        raise Refusal(f'{builder.info.full_name} has no train split, only '
                      f'{list(builder.info.splits)}')

    def lines(counts: Counts) -> Iterator[str]:
        source = (builder.as_data_source('train') if random_access(builder)
                  else tfds.as_numpy(builder.as_dataset(split='train')))
        for article in source:
            text = article['text'].decode('utf-8', errors='replace')
            yield from bounded_lines((f'{line}\n' for line in article_lines(text, counts)), counts)

    train = builder.info.splits['train']
    content = [_content(file, hashes) for file in train.filepaths]
    return Corpus(name=safe_name(builder.info.full_name), size=None, lines=lines,
                  described=f'{builder.info.full_name} ({train.num_examples:,} articles)',
                  identity=f'{builder.info.full_name} {train.num_examples} {content}')


def _content(file: epath.PathLike, hashes: ContentHashes) -> str:
    """The hash of a local file; of one in a bucket, its size and time."""
    if '://' not in str(file):
        return hashes.of(file)
    stat = epath.Path(file).stat()
    return f'{stat.length} {stat.mtime}'


def random_access(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether its files are those that are read without TensorFlow."""
    return builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD


def article_lines(text: str, counts: Counts) -> Iterator[str]:
    """Yields the paragraphs of an article, without wiki40b's titles and marks."""
    counts.replaced_characters += text.count('\N{REPLACEMENT CHARACTER}')
    lines = text.replace('_NEWLINE_', '\n').split('\n')
    for before, line in itertools.pairwise(['', *lines]):
        is_title = before in _WIKI40B_MARKS[:2]
        if line and line not in _WIKI40B_MARKS and not is_title:
            yield line
