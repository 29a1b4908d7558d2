"""The command, on the folders of a run and of Hugging Face."""

import json
import shutil
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from pkm_jax import convert_checkpoint, predict
from tests.prediction.conftest import WORDS, folder_of  # noqa: F401

GOLDENS = Path(__file__).parent / 'convert/goldens'


def run(capsys, *arguments):
    predict.main(list(arguments))
    out, err = capsys.readouterr()
    return out, err


def test_a_file_becomes_a_json_object_a_line_and_its_time_is_said(folder_of, tmp_path, capsys):  # noqa: F811
    file = tmp_path / 'texts.txt'
    file.write_text('\n'.join(['a [MASK]', 'b [MASK] c', '[MASK] ' + 'd ' * 60]))
    out, err = run(capsys, folder_of('plain'), f'--file={file}', '--batch=2', '--top_k=2')
    results = [json.loads(line) for line in out.splitlines()]
    assert [result['text'][:1] for result in results] == ['a', 'b', '[']
    assert len(results[0]['masks'][0]) == 2
    assert '1 of 3 texts were cut off: the model takes 48 tokens' in err
    assert err.splitlines()[-1].startswith('3 texts of 57 tokens in ')


def test_text_for_people(folder_of, capsys):  # noqa: F811
    out, _ = run(capsys, folder_of('causal'), 'a b', '--temperature=0', '--max_new=3',
                 '--format=text')
    assert out.startswith('a b …')


@pytest.mark.parametrize('name, texts, fields', [
    ('masked_lm', ['a [MASK]'], {'text', 'masks'}),
    ('memory_added', ['a [MASK]'], {'text', 'masks'}),
    ('classification', ['a b'], {'text', 'prediction', 'probabilities'}),
    ('question_answering', ['a', 'b c'],
     {'question', 'context', 'answer', 'probability', 'candidates'}),
])
def test_hugging_face_folders_are_used_as_they_are(name, texts, fields, tmp_path, capsys):
    folder = tmp_path / name
    shutil.copytree(GOLDENS / name, folder)
    (folder / 'vocab.txt').write_text('\n'.join(WORDS))
    out, _ = run(capsys, str(folder), *texts)
    assert set(json.loads(out)) == fields


@pytest.mark.parametrize('kind, texts', [
    ('bert', ['a [MASK] b']), ('classes', ['a b']), ('answers', ['a', 'b c d']),
    ('labels', ['a bx . c'])])
def test_an_exported_run_says_what_the_run_says(folder_of, tmp_path, capsys, kind, texts):  # noqa: F811
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(['test', '--from=', '--to='])
    with flagsaver.as_parsed():
        convert_checkpoint.export(Path(folder_of(kind)), tmp_path / 'out')
    ours, theirs = (json.loads(run(capsys, str(folder), *texts)[0])
                    for folder in (folder_of(kind), tmp_path / 'out'))
    for name in ('masks', 'prediction', 'answer', 'labels'):
        assert _rounded(ours.get(name)) == _rounded(theirs.get(name))


def _rounded(value):
    """Scores that a result holds, to four digits."""
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 4))


@pytest.mark.parametrize('arguments, words', [
    (['plain', '[MASK]', '--seed=3', '--top_p=.5'], r'Leave out --top_p and --seed: .* is a BERT'),
    (['causal', 'a', '--top_k=2'], r'Leave out --top_k: .* is a causal model'),
    (['classes', 'a', '--top_k=2'], 'Leave out --top_k'),
    (['encoder', 'a'], 'has no MLM head'),
    (['plain', 'a'], r'text 1 has no \[MASK\]'),
    (['plain', '--batch=0', 'a'], '--batch=0 must be 1 or more'),
])
def test_what_cannot_be_predicted_is_named(folder_of, arguments, words):  # noqa: F811
    with pytest.raises(SystemExit, match=f'Not predicted: .*{words}'):
        predict.main([folder_of(arguments[0]), *arguments[1:]])


def test_a_folder_without_words_or_weights_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r'has no tokenizer.json or vocab.txt'):
        predict.main([str(GOLDENS / 'masked_lm'), 'a'])
    with pytest.raises(SystemExit, match='has no config.json'):
        predict.main([str(tmp_path), 'a'])
