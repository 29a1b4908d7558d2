"""Fine-tuning end to end: tiny files in every format, a model of one small layer, all it writes."""

import json

import numpy as np
import pytest

from configs import conll, glue, squad, text
from pkm_jax import finetune, replay
from pkm_jax.checkpoints import store
from pkm_jax.configuration.folder import read_description
from pkm_jax.configuration.resolve import resolve
from pkm_jax.refusal import Refusal
from pkm_jax.training.divergence import Diverged
from tests.conftest import WORDS
from tests.training.runs import killed_after, train

pytestmark = pytest.mark.usefixtures('compile_once')


@pytest.fixture
def tuned(tiny_bert, tmp_path):
    """Fine-tunes the tiny model by a configuration; returns the results and the folder."""
    def run(config, source=tiny_bert, **data):
        config.update(workdir=str(tmp_path / 'run'), init_from=str(source))
        config.model.update(dropout=0., attention_dropout=0.)
        config.data.update({'length': 32, 'buckets': (16, 32), **data})
        config.train.update(batch=16, learning_rate=3e-2, values_learning_rate=3e-2)
        with config.unlocked():
            config.compilation_cache = ''
        return finetune.run(config), tmp_path / 'run'
    return run


def texts(size, seed=0):
    """Texts of 3 to 24 words, of which some have the word that decides."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(size):
        words = [WORDS[number] for number in rng.integers(2, len(WORDS), rng.integers(3, 25))]
        label = int(rng.integers(2))
        words[int(rng.integers(len(words)))] = WORDS[label]
        found.append((' '.join(words), label))
    return found


def table(path, rows, header='text\tlabel'):
    path.write_text('\n'.join([header, *('\t'.join(map(str, row)) for row in rows)]) + '\n')
    return str(path)


@pytest.mark.slow
def test_classes(tuned, tmp_path):
    names = 'bad', 'good'
    train = table(tmp_path / 'train.tsv', [(line, names[label]) for line, label in texts(203)])
    config = text.get_config()
    config.finetune.update(epochs=6.)
    results, folder = tuned(config, train=train, validation_fraction=.2)
    assert results['mean'] > .9
    run = resolve(read_description(folder))
    assert run.task.labels == names and run.model.classes == 2
    assert run.model.output_heads == ('pooler', 'classifier') and run.train.steps == 6 * 11
    found = json.loads((folder / 'eval_results.json').read_text())
    assert found['eval_samples'] == 41 and found['eval_accuracy'] == found['score'] > .9
    rows = list(map(json.loads, (folder / 'predictions_validation.jsonl').read_text().splitlines()))
    assert len(rows) == 41
    right = np.mean([row['prediction'] == row['label'] for row in rows])
    assert right == pytest.approx(found['eval_accuracy'])
    assert store.of_run(folder).parent.name == 'best' and (folder / 'tokenizer.json').exists()
    check_resumption(config, folder, tmp_path / 'killed')
    page = (folder / 'report/report.html').read_text()
    assert 'commonest class of the training' in page and 'erdict' not in page.split('</style>')[1]


def check_resumption(config, straight, folder):
    """The same run, killed between two checkpoints and gone on with, is the same to the bit."""
    config.workdir = str(folder)
    with killed_after(40):
        finetune.run(config)
    assert store.newest(folder).name == '33'
    finetune.run(config)
    assert (folder / 'eval_results.json').read_text() == (straight / 'eval_results.json').read_text()
    for kind in (store.newest, store.of_run):
        assert kind(folder).name == kind(straight).name
        ours, theirs = (store.read_weights(kind(run)) for run in (folder, straight))
        for name in theirs:
            np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]))


@pytest.mark.slow
def test_a_run_that_diverges_is_replayed(tuned, tmp_path):
    config = text.get_config()
    config.finetune.update(epochs=2., learning_rates=(1e30,), warmup=0.)
    config.train.update(max_skipped_steps=2, clip=0.)
    path = table(tmp_path / 'train.tsv', [(line, label) for line, label in texts(64)])
    with pytest.raises(Diverged):
        tuned(config, train=path, length=16, buckets=(16,))
    run, = replay.diverged(config)
    step = json.loads((run.folder / 'diverged/diagnosis.json').read_text())['step']
    told = replay.replay(run)
    assert f'step {step} gave the loss' in told and 'nan' in told
    config.workdir = str(tmp_path / 'elsewhere')
    with pytest.raises(Refusal, match='no run in it has diverged'):
        replay.diverged(config)


def pairs(size, seed):
    """Pairs of texts with the share of the second's words that the first has, 0 to 5."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(size):
        same = int(rng.integers(2))
        first = WORDS[:6] if same else WORDS[6:12]
        rows.append((number, *'gfyinn', ' '.join(rng.permutation(first)),
                     ' '.join(rng.permutation(WORDS[:6])), f'{5. * same:.3f}'))
    return rows


@pytest.mark.slow
def test_glue_with_a_memory_over_seeds(tuned, tmp_path):
    """Regression of pairs; what the server takes; usage before and after; mean and deviation."""
    header = '\t'.join(['index', *'abcdef', 'sentence1', 'sentence2', 'score'])
    folder = tmp_path / 'STS-B'
    folder.mkdir()
    for name, size in (('train', 96), ('dev', 19)):
        table(folder / f'{name}.tsv', pairs(size, size), header)
    table(folder / 'test.tsv', [row[:-1] for row in pairs(7, 7)], header.removesuffix('\tscore'))
    config = glue.get_config('task=stsb')
    config.finetune.update(epochs=4., seeds=(1, 2))
    config.memory.update(placement='add', layers=(0,), zero_start=True, sub_keys=6, heads=2,
                         top_k=3, query_width=8)
    results, folder = tuned(config, folder=str(tmp_path))
    assert results['metric'] == 'combined_score' and results['mean'] > .8
    assert json.loads((folder / 'summary.json').read_text())['deviation'] == pytest.approx(
        np.std(results['scores'], ddof=1))
    found = results['runs']['seed1']
    assert found['eval_combined_score'] == pytest.approx(
        (found['eval_pearson'] + found['eval_spearmanr']) / 2)
    use = found['memory']['0']
    assert 0 < use['before']['top_k_usage'] <= 1 and use['before'] != use['after']
    lines = (folder / 'seed1/STS-B.tsv').read_text().splitlines()
    assert lines[0] == 'index\tprediction' and len(lines) == 8
    assert all(0 <= float(line.split('\t')[1]) <= 5 for line in lines[1:])
    assert 'test_loss' not in found


@pytest.mark.slow
def test_several_classes_each_and_stopping_early(tuned, tmp_path):
    """From JSON lines; a metric that gets no better ends the run, which is not gone on with."""
    path = tmp_path / 'train.jsonl'
    path.write_text(''.join(json.dumps({'text': line, 'label': [WORDS[label], 'all'][label:]}) + '\n'
                            for line, label in texts(64)))
    config = text.get_config()
    config.finetune.update(epochs=40.)
    config.train.update(patience=2, best='exact_match')
    results, folder = tuned(config, train=str(path), problem='multi_label')
    lines = list(map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines()))
    scores = [line['exact_match'] for line in lines if line['kind'] == 'eval']
    assert len(scores) < 40 and max(scores) == scores[-3] > max(scores[-2:]) - 1e-9
    assert results['runs']['run']['eval_exact_match'] == pytest.approx(scores[-3])
    before = (folder / 'metrics.jsonl').read_text()
    finetune.run(config)
    assert (folder / 'metrics.jsonl').read_text() == before


def questions(size, seed):
    """'Which word follows X?' over paragraphs of 40 words, longer than a window."""
    rng = np.random.default_rng(seed)
    paragraphs = []
    for number in range(size):
        words = [WORDS[place] for place in rng.permutation(len(WORDS))] * 2
        start = len(' '.join(words[:30])) + 1
        paragraphs.append({'context': ' '.join(words), 'qas': [
            {'id': f'a{number}', 'question': words[29],
             'answers': [{'text': words[30], 'answer_start': start}]},
            {'id': f'b{number}', 'question': 'memory', 'answers': [], 'is_impossible': True}]})
    return {'data': [{'paragraphs': paragraphs}]}


def test_questions(tuned, tmp_path, capsys):
    train = questions(20, 0)
    train['data'][0]['paragraphs'][3]['qas'][0]['answers'][0]['answer_start'] += 1
    for name, content in (('train', train), ('dev', questions(6, 1))):
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    config = squad.get_config('version=2')
    config.finetune.update(epochs=1.)
    results, folder = tuned(config, train=str(tmp_path / 'train.json'),
                            validation=str(tmp_path / 'dev.json'), stride=8)
    said = capsys.readouterr().out
    assert 'WARNING: 1 questions whose answer is not where it is said to be' in said
    assert 'qas[0] (id a3): the answer is' in said
    found = results['runs']['run']
    assert 0 <= found['eval_HasAns_f1'] <= 100 and found['eval_NoAns_exact'] in (0, 100)
    answers = json.loads((folder / 'predictions_validation.json').read_text())
    assert answers.keys() == {f'{kind}{number}' for kind in 'ab' for number in range(6)}
    odds = json.loads((folder / 'null_odds_validation.json').read_text())
    best = json.loads((folder / 'nbest_predictions_validation.json').read_text())
    for name, answer in answers.items():
        assert answer == ('' if odds[name] > 0 else best[name][0]['text'])
        assert best[name][0]['text'] in questions(6, 1)['data'][0]['paragraphs'][
            int(name[1:])]['context']


@pytest.mark.slow
def test_words(tuned, tmp_path):
    """Entities of two words, in sentences of which some are longer than a sequence."""
    rng = np.random.default_rng(0)
    for name, size in (('train', 120), ('valid', 20)):
        lines = []
        for _ in range(size):
            words = [(WORDS[number], 'O') for number in rng.integers(4, len(WORDS),
                                                                     rng.integers(4, 45))]
            place = int(rng.integers(len(words) - 2))
            words[place:place + 2] = [(WORDS[0], 'B-X'), (WORDS[1], 'I-X')]
            lines += [f'{word} NN {label}' for word, label in words] + ['']
        (tmp_path / f'{name}.txt').write_text('\n'.join(lines))
    config = conll.get_config()
    config.finetune.update(epochs=4.)
    results, folder = tuned(config, train=str(tmp_path / 'train.txt'),
                            validation=str(tmp_path / 'valid.txt'))
    assert results['metric'] == 'f1' and results['mean'] > .9
    assert resolve(read_description(folder)).task.labels == ('B-X', 'I-X', 'O')
    lines = (folder / 'predictions_validation.txt').read_text().splitlines()
    words = [line for line in (tmp_path / 'valid.txt').read_text().splitlines() if line]
    assert [line.rsplit(' ', 1)[0].split() for line in lines if line] == [
        [line.split()[0], line.split()[2]] for line in words]


@pytest.mark.parametrize('rows, data, message', [
    ([('a', 'x'), ('b', 'y')], dict(text='review'), "line 2 has no column 'review'"),
    ([('a', 'x'), ('b', 'x')], {}, "line .: all examples have the label 'x'"),
    ([('a', 'x'), ('b', '')], {}, 'line 3 has no label'),
    ([('a', '1'), ('b', '1e300')], dict(problem='regression'), "line 3: '1e300' is no number"),
    ([('a', '1'), ('b', 'x')], dict(problem='regression'), "line 3: 'x' is no number"),
    ([('a', 'x'), ('b', 'z')], dict(labels=('x', 'y')), "line 3: the label 'z' is none of 'x', 'y'"),
    ([('a', 'x'), ('b', 'y')], dict(class_weights='balanced', problem='regression'), "'single_label'"),
])
def test_what_cannot_be_learnt_is_refused(rows, data, message, tuned, tmp_path):
    with pytest.raises(Refusal, match=message):
        tuned(text.get_config(), train=table(tmp_path / 'train.tsv', rows), **data)
    assert not (tmp_path / 'run').exists()


def test_a_label_that_was_never_seen_in_training(tuned, tmp_path):
    train = table(tmp_path / 'train.tsv', [('a', 'x'), ('b', 'y')])
    validation = table(tmp_path / 'valid.tsv', [('a', 'x'), ('b', 'z')])
    with pytest.raises(Refusal, match=r"valid.tsv, line 3: the label 'z' .* never seen there"):
        tuned(text.get_config(), train=train, validation=validation)


def test_several_tasks_have_an_average(monkeypatch, tmp_path):
    found = {'cola': .5, 'stsb': .7}
    monkeypatch.setattr(finetune, 'finetune', lambda config: {
        'metric': 'score', 'mean': found.get(config['data']['name'], .9), 'deviation': 0.,
        'scores': [1.]})
    config = glue.get_config('task=all')
    config.workdir = str(tmp_path)
    assert finetune.run(config)['average'] == pytest.approx((.5 + .7 + 7 * .9) / 9)
    written = json.loads((tmp_path / 'summary.json').read_text())
    assert len(written['tasks']) == 9 and written['tasks']['stsb']['mean'] == .7


@pytest.mark.slow
def test_a_pretrained_run_and_its_memory_are_fine_tuned(config, tuned, tmp_path):
    config.workdir = str(tmp_path / 'pretrained')
    source = train(config)
    task = text.get_config()
    task.finetune.epochs = 1.
    path = table(tmp_path / 'train.tsv', [(line, label) for line, label in texts(40)])
    results, folder = tuned(task, train=path, length=16, buckets=(16,), source=source)
    run = resolve(read_description(folder))
    assert run.model.memory_layers == (1,) and run.model.memory.sub_keys == 6
    assert run.model.vocab_size == 120 and run.task.labels == ('0', '1')
    assert results['runs']['run']['memory'].keys() == {'1'}


def test_nothing_to_start_from():
    with pytest.raises(Refusal, match="init_from = ''"):
        finetune.run(text.get_config())
