"""GLUE's official files: columns, quotes, labels and their order."""

import pytest

from pkm_jax.data.glue import TASKS, read_glue, submission
from pkm_jax.refusal import Refusal

PAIR = 'index\tsentence1\tsentence2\tlabel\n'
MNLI = ('index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t'
        'sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n')
STSB = ('index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n')
# By task a file with labels, the texts and labels that it holds, and one without.
FILES = {
    'cola': ('gj04\t0\t*\tThey "drank it.\ngj04\t1\t\tHe ran.\n',
             [('They "drank it.', None, 'unacceptable'), ('He ran.', None, 'acceptable')],
             'index\tsentence\n0\tBill left.\n'),
    'sst2': ('sentence\tlabel\na film \t1\n', [('a film ', None, 'positive')],
             'index\tsentence\n0\ta film\n'),
    'mrpc': ('Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\t"a\tb"\n',
             [('"a', 'b"', 'equivalent')],
             'index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\ta\tb\n'),
    'stsb': (STSB + '0\tg\tf\t2012\t1\tn\tn\ta\tb\t4.750\n', [('a', 'b', '4.750')],
             STSB.replace('\tscore', '') + '0\tg\tf\t2012\t1\tn\tn\ta\tb\n'),
    'qqp': ('id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\ta?\tb?\t1\n8\t1\t2\ta\n',
            [('a?', 'b?', 'duplicate')], 'id\tquestion1\tquestion2\n0\ta?\tb?\n'),
    'mnli': (MNLI + '0\tp\tq\tg\t(\t(\t(\t(\ta\tb\tneutral\tneutral\n', [('a', 'b', 'neutral')],
             MNLI.replace('\tlabel1\tgold_label', '') + '0\tp\tq\tg\t(\t(\t(\t(\ta\tb\n'),
    'qnli': ('index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n',
             [('q', 's', 'not_entailment')], 'index\tquestion\tsentence\n0\tq\ts\n'),
    'rte': (PAIR + '0\ta\tb\tentailment\n', [('a', 'b', 'entailment')],
            'index\tsentence1\tsentence2\n0\ta\tb\n'),
    'wnli': (PAIR + '0\ta\tb\t1\n', [('a', 'b', 'entailment')],
             'index\tsentence1\tsentence2\n0\ta\tb\n'),
}


def write(root, name, labelled, test):
    task = TASKS[name]
    folder = root / task.folder
    folder.mkdir()
    for stem in ('train', *task.validation):
        (folder / f'{stem}.tsv').write_text(labelled)
    for stem in task.test:
        (folder / f'{stem}.tsv').write_text(test)
    return str(root)


@pytest.mark.parametrize('name', TASKS)
def test_official_files(name, tmp_path):
    labelled, expected, test = FILES[name]
    said = []
    found = read_glue(write(tmp_path, name, labelled, test), name, said.append)
    for split in ('train', 'validation'):
        texts = found[split]
        seconds = texts.seconds or [None] * len(texts.texts)
        assert list(zip(texts.texts, seconds, texts.labels)) == expected
    assert found['test'].labels is None and len(found['test'].texts) == 1
    assert bool(said) == (name == 'qqp')
    splits = {'train', 'validation', 'test'}
    assert found.keys() == (splits | {'validation_mm', 'test_mm'} if name == 'mnli' else splits)


def test_damaged_rows_of_qqp_are_counted_and_named(tmp_path):
    said = []
    labelled, _, test = FILES['qqp']
    read_glue(write(tmp_path, 'qqp', labelled, test), 'qqp', said.append)
    assert '1 rows' in said[0] and 'train.tsv, line 3' in said[0]


def test_outputs_are_in_the_order_of_published_models():
    assert list(TASKS['mnli'].labels) == ['entailment', 'neutral', 'contradiction']
    assert list(TASKS['rte'].labels) == ['entailment', 'not_entailment']
    assert list(TASKS['wnli'].labels.values()) == ['not_entailment', 'entailment']


def test_diagnostics_belong_to_mnli(tmp_path):
    labelled, _, test = FILES['mnli']
    root = write(tmp_path, 'mnli', labelled, test)
    (tmp_path / 'AX').mkdir()
    (tmp_path / 'AX/diagnostic.tsv').write_text('index\tsentence1\tsentence2\n0\ta\tb\n')
    assert read_glue(root, 'mnli', print)['test_ax'].texts == ['a']
    assert [submission('mnli', split) for split in ('test', 'test_mm', 'test_ax')] == [
        'MNLI-m.tsv', 'MNLI-mm.tsv', 'AX.tsv']
    assert submission('sst2', 'test') == 'SST-2.tsv'


@pytest.mark.parametrize('name, labelled, message', [
    ('sst2', 'sentence\tlabel\na\t2\n', r"train.tsv, line 2: the label '2' is none of '0', '1'"),
    ('sst2', 'sentence\tlabel\na\t1\t\n', r'train.tsv, line 2 has 2 tabs'),
    ('cola', 'gj04\t1\tShe left.\n', r'train.tsv, line 1 has 2 tabs, where 3'),
    ('rte', 'index\tsentence1\tlabel\n0\ta\tentailment\n', "train.tsv has no column 'sentence2'"),
    ('rte', '', 'train.tsv is empty'), ('rte', PAIR, 'train.tsv holds no rows'),
])
def test_other_files_are_refused(name, labelled, message, tmp_path):
    with pytest.raises(Refusal, match=message):
        read_glue(write(tmp_path, name, labelled, FILES[name][2]), name, print)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Refusal, match=r'SST-2/train.tsv is missing.*CoLA, SST-2, MRPC'):
        read_glue(str(tmp_path), 'sst2', print)
