"""Articles of TFDS, without TensorFlow."""

import pytest

from pkm_jax.data import tfds_text
from pkm_jax.data.corpus import Counts
from pkm_jax.data.files import ContentHashes
from pkm_jax.refusal import Refusal


def test_articles_lose_their_titles_and_marks():
    article = ('\n_START_ARTICLE_\nA title\n_START_SECTION_\nHistory\n_START_PARAGRAPH_\n'
               'It began here._NEWLINE_It ended there.')
    assert list(tfds_text.article_lines(article, Counts())) == ['It began here.', 'It ended there.']
    assert list(tfds_text.article_lines('Plain text.\n\nMore.', Counts())) == ['Plain text.', 'More.']


def test_a_corpus_of_tfds_names_the_remedy_where_tensorflow_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_text.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(Refusal, match=r"tfds:wiki40b/en.*pip install 'pkm-jax\[tensorflow\]'"):
        tfds_text.named('wiki40b/en', ContentHashes(tmp_path))


def test_text_prepared_by_tfds_is_read_without_tensorflow(tmp_path):
    tfds = tfds_text.tfds
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name='articles', version=tfds.core.Version('1.0.0'),
                                          data_dir=str(tmp_path), module_name='articles'),
        features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=10, file_format='array_record')
    writer.initialize_splits(['train'])
    writer.add_examples({'train': [{'text': 'First article.\n\nIts end.'}, {'text': 'Second.'}]})
    writer.close_all()
    text = tfds_text.directory(str(tmp_path), ContentHashes(tmp_path))
    paragraphs = list(text.paragraphs(Counts()))
    assert paragraphs == ['First article.', 'Its end.', 'Second.']
