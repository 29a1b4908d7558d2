"""What ends up in the page, on synthetic runs."""

import math
import re
import subprocess
import sys

import pytest

from pkm_jax.refusal import Refusal
from pkm_jax.report.__main__ import main
from pkm_jax.report.report import write_report
from pkm_jax.report.runs import read_run, read_runs
from tests.report.synthetic_runs import cells, edit_evals, make_run, usage


def test_page_is_self_contained_with_light_and_dark_figures_beside_it(quickstart, page):
    written = {file.name for file in (quickstart / 'report').iterdir()}
    names = ('loss', 'usage', 'usage_training', 'slots_layer_2', 'access')
    assert written == {'report.html'} | {f'{n}{t}.png' for n in names for t in ('', '_dark')}
    assert page.count('src="data:image/png;base64,iVBOR') == 5
    assert page.count('srcset="data:image/png;base64,iVBOR') == 5
    assert not re.search(r'https?://|<script|<link|src="(?!data:)|url\(', page)


def test_a_folder_and_a_run_in_it_of_the_same_name_are_both_reported(tmp_path):
    outer = make_run(tmp_path / 'run', losses=(9.0, 6.4))
    make_run(outer / 'run', losses=(9.0, 5.5), seed=1)
    page = write_report(outer).read_text()
    assert cells(page, 'Evaluation loss, nats') == ['6.418', '5.524']
    assert f'{tmp_path.name}/run</th>' in page and '</i>run/run</th>' in page


def test_table(quickstart, page):
    assert cells(page, 'Placement of the memory') == ['none', 'add', 'replace']
    assert cells(page, 'Initialisation') == ['scratch', 'from pretrain', 'scratch']
    assert cells(page, 'Steps') == ['100', '100 (after 100)', '100']
    assert cells(page, 'Training tokens') == ['205k', '205k (after 205k)', '205k']
    assert cells(page, 'Parameters') == ['4.71M'] * 3
    assert cells(page, 'Tokens per second (median)') == ['8.12k'] * 3
    assert cells(page, 'Evaluation loss, nats') == ['6.418', '5.606', '6.318']
    assert cells(page, 'Perplexity')[0] == f'{math.exp(6.4 + 2.6 * math.exp(-5)):.1f}'
    assert cells(page, 'Slots S · heads H · reads K') == ['–', '576 · 2 · 4', '576 · 2 · 4']
    assert cells(page, 'Evaluation tokens T') == ['–', '8.19k', '8.19k']
    for label, key, form in (
        ('Top-1 usage', 'top_1_usage', '.1%'),
        ('Gini', 'gini', '.3f'),
        ('Top-K usage', 'top_k_usage', '.1%'),
        ('KL from uniform (nats)', 'kl', '.3f'),
        ('Uniform picks would reach', 'ceiling', '.1%'),
    ):
        expected = [format(usage(quickstart, run, key), form) for run in ('add', 'replace')]
        assert cells(page, label) == ['–', *expected]
    assert cells(page, 'Dead slots') == []  # known of none


def test_unreported_parent_is_said(small):
    added = read_runs(small, ['add', 'replace'])[0]
    assert added.parent is None and added.start_tokens == 0
    assert added.notes == [
        f'starts from {small / "pretrain"}, whose training is not part of this report'
    ]


def test_single_run_without_memory(tmp_path):
    page = write_report(make_run(tmp_path / 'plain')).read_text()
    assert page.count('<figure>') == 1
    assert 'None of the runs has evaluated a memory' in page and 'No verdict' in page
    assert cells(page, 'Placement of the memory') == ['none']


CAUSAL = {'name': 'Causal-LM loss', 'unit': 'nats', 'meaning': 'mean cross-entropy of all tokens'}
SQUARES = {'name': 'Squared error', 'unit': '', 'meaning': 'mean square of what estimates are off'}


def test_losses_are_called_as_their_tasks_call_them(tmp_path):
    page = write_report(make_run(tmp_path / 'causal', loss_name=CAUSAL)).read_text()
    assert '<dt>Causal-LM loss</dt><dd>mean cross-entropy of all tokens, in nats</dd>' in page
    assert 'asked' not in page.split('</style>')[1] and cells(page, 'Evaluation loss, nats')
    make_run(tmp_path / 'both/causal', loss_name=CAUSAL)
    make_run(tmp_path / 'both/squares', loss_name=SQUARES)
    page = write_report(tmp_path / 'both').read_text()
    assert '<dt>Causal-LM loss</dt>' in page and '<dt>Squared error</dt>' in page
    assert len(cells(page, 'Evaluation loss')) == 2


def test_memories_are_called_as_their_models_call_them(tmp_path):
    run = make_run(tmp_path / 'run', placement='add', skews=(0.5,), side=12, tokens=256)
    lines = (run / 'metrics.jsonl').read_text()
    (run / 'metrics.jsonl').write_text(
        lines.replace('"2": "layer 2"', '"bank": "the bank"').replace('"2": {', '"bank": {'))
    (run / 'slot_counts_2.npz').rename(run / 'slot_counts_bank.npz')
    page = write_report(run).read_text()
    assert 'The bank: memory at the last evaluation' in page and 'Layer' not in page
    assert (run / 'report' / 'slots_layer_bank.png').exists()


def test_several_layers_have_a_row_and_an_image_each(tmp_path):
    run = make_run(
        tmp_path / 'run', placement='add', skews=(0.5,), layers=('2', '10'), side=12, tokens=256
    )
    page = write_report(run).read_text()
    assert page.index('Layer 2: memory') < page.index('Layer 10: memory')
    assert (run / 'report' / 'slots_layer_10.png').exists()
    expected = [f'{usage(tmp_path, "run", layer=layer):.1%}' for layer in ('2', '10')]
    assert cells(page, 'Top-1 usage') == expected


def test_unfinished_run_with_a_line_cut_short(tmp_path):
    run = make_run(tmp_path / 'run', planned=400)
    with (run / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "step": 101, "lo')
    page = write_report(tmp_path).read_text()
    assert 'the last line of metrics.jsonl is cut short and was ignored' in page
    assert 'unfinished: 100 of 400 steps' in page
    assert cells(page, 'Steps') == ['100']


def test_lines_that_are_no_objects_are_ignored_and_said(tmp_path):
    run = make_run(tmp_path / 'run')
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    (run / 'metrics.jsonl').write_text('\n'.join([lines[0], '12', *lines[1:], 'null']))
    page = write_report(tmp_path).read_text()
    assert 'line 2 of metrics.jsonl is not a JSON object and was ignored' in page
    assert 'the last line of metrics.jsonl is not a JSON object and was ignored' in page
    assert cells(page, 'Steps') == ['100']


@pytest.mark.parametrize('damage', [
    lambda file: file.write_bytes(file.read_bytes()[:-40]),
    pytest.param(lambda file: file.write_bytes(b''), marks=pytest.mark.slow),
    pytest.param(lambda file: file.write_bytes(file.read_bytes().replace(b'top1', b'top2')),
                 marks=pytest.mark.slow),
    lambda file: file.write_bytes(file.read_bytes()[:400] + b'!' + file.read_bytes()[401:])])
def test_damaged_slot_counts_are_named_and_left_out(small, caplog, damage):
    damage(small / 'add' / 'slot_counts_2.npz')
    page = write_report(small).read_text()
    assert 'slot_counts_2.npz is damaged' in page
    assert 'the next evaluation of the run writes it anew' in page
    assert f'{small}/add: slot_counts_2.npz is damaged' in caplog.text
    assert len(read_run(small / 'replace').access) == 1 and not read_run(small / 'add').access
    assert cells(page, 'Top-1 usage')[1] == f'{usage(small, "add"):.1%}'


@pytest.mark.parametrize(('config', 'words'), [
    ('{"init_from": "", "memory": {"placement": "add"}}', "no 'train'"),
    ('{"init_from": "", "train": null}', 'NoneType'),
    ('[1]', 'list indices'),
    ('{"init', 'Unterminated string'),
])
def test_a_configuration_that_is_not_of_training_is_refused(tmp_path, config, words):
    run = make_run(tmp_path / 'run')
    (run / 'config.json').write_text(config)
    with pytest.raises(SystemExit, match=f'run/config.json is not the config.*{words}') as refused:
        main([str(tmp_path)])
    assert '\n' not in str(refused.value)


def test_a_tilde_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    make_run(tmp_path / 'run')
    main(['~/run'])
    assert str(tmp_path / 'run' / 'report') in capsys.readouterr().out


def test_run_that_never_evaluated(small):
    edit_evals(small / 'add', lambda record: None)
    page = write_report(small).read_text()
    assert cells(page, 'Evaluation loss, nats')[1] == '–'
    assert cells(page, 'Top-1 usage')[1] == '–'


def test_names_are_escaped(tmp_path):
    page = write_report(make_run(tmp_path / '<i>&', planned=400)).read_text()
    assert '&lt;i&gt;&amp;' in page and '<i>&' not in page


def test_nothing_to_report_names_the_folder(tmp_path):
    with pytest.raises(Refusal, match=f'nothing to report in {re.escape(str(tmp_path))}'):
        write_report(tmp_path)
    run = make_run(tmp_path / 'run')
    (run / 'metrics.jsonl').write_text('')
    with pytest.raises(Refusal, match='nothing to report'):
        write_report(tmp_path)
    assert not (tmp_path / 'report').exists()


def test_missing_files_and_fields_are_named(tmp_path):
    run = make_run(tmp_path / 'run')
    with pytest.raises(Refusal, match='other/config.json is missing'):
        write_report(tmp_path, ['run', 'other'])
    (run / 'metrics.jsonl').write_text('{"kind": "train", "loss": 3.0}\n')
    with pytest.raises(Refusal, match='line 1 has no step, tokens'):
        write_report(tmp_path)
    (run / 'metrics.jsonl').write_text('{"kind": "train", "step": 1, "tokens": 9}\n')
    with pytest.raises(SystemExit, match='line 1 has no loss: not a metrics line'):
        main([str(tmp_path)])


@pytest.mark.slow
def test_module_is_a_command(tmp_path):
    make_run(tmp_path / 'run')
    command = [sys.executable, '-m', 'pkm_jax.report']
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / 'report' / 'report.html')
    failed = subprocess.run([*command, str(tmp_path / 'none')], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith('Not reported: nothing to report in')


def test_named_runs_alone_are_reported(small):
    main([str(small), 'add', 'replace'])
    page = (small / 'report' / 'report.html').read_text()
    assert cells(page, 'Placement of the memory') == ['add', 'replace']


def test_the_report_needs_nothing_of_training():
    """It reads folders; a program that trains nothing can draw it."""
    code = 'import sys, pkm_jax.report.__main__; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    packages = {name.split('.')[1] for name in modules if name.startswith('pkm_jax.')}
    assert packages <= {'report', 'memory', 'optimizers', 'refusal', 'mesh', 'dispatch', 'console',
                        'fields', 'ops', 'data'}
    assert not {'grain', 'tensorflow_datasets', 'orbax'} & set(modules)
