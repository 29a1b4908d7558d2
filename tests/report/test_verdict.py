"""What a report says about its runs, in words."""

import math

import pytest

from pkm_jax.report.report import write_report
from pkm_jax.report.runs import read_run, read_runs
from pkm_jax.report.verdict import verdicts
from tests.report.synthetic_runs import cells, edit_evals, make_quickstart, make_run, usage


def verdict(runs):
    """The only verdict on these runs."""
    (said,) = verdicts(runs)
    return said


def test_verdict_holds_with_the_numbers_of_the_files(quickstart, page):
    one, two = usage(quickstart, 'add'), usage(quickstart, 'replace')
    assert one > two + 0.1
    said = verdict(read_runs(quickstart))
    assert said.holds is True
    for text in (said.text, page):
        assert 'After 100 steps with memory each (add had 100 steps without memory before)' in text
        assert f'{one:.1%} of its slots' in text and f'{two:.1%}' in text
        assert f'{(one - two) * 100:.1f} percentage points more, {one / two:.2f} times' in text
        assert 'over T = 8.19k evaluation tokens' in text
        assert 'uniform picks would reach 100.0%' in text
        assert 'add has the better evaluation loss, 5.606 against 6.318 nats' in text
    assert 'class="verdict yes"' in page and 'Yes: added + pretrained uses more' in page


def test_verdict_says_when_it_does_not_hold(tmp_path):
    folder = make_quickstart(tmp_path, added=1.6, replaced=0.2, tokens=256, side=12)
    one, two = usage(folder, 'add'), usage(folder, 'replace')
    said = verdict(read_runs(folder))
    assert said.holds is False
    assert said.title == 'No: added + pretrained uses fewer of its slots'
    assert f'{(two - one) * 100:.1f} percentage points fewer' in said.text
    assert 'class="verdict no"' in write_report(folder).read_text()


def test_verdict_calls_a_small_difference_none(small):
    def alike(share):
        def change(record):
            record['memory']['2']['top_1_usage'] = share
            return record

        return change

    edit_evals(small / 'add', alike(0.504))
    edit_evals(small / 'replace', alike(0.5))
    said = verdict(read_runs(small))
    assert said.holds is False and 'alike' in said.title and '+0.4 percentage points' in said.text


def test_verdict_compares_the_last_step_both_have(small):
    edit_evals(small / 'replace', lambda record: record if record['step'] <= 50 else None)
    said = verdict(read_runs(small))
    assert said.text.startswith('After 50 steps with memory each')
    halfway = [r for r in read_run(small / 'add').evals if r['step'] == 50][0]
    assert f'{halfway["memory"]["2"]["top_1_usage"]:.1%} of its slots' in said.text


def test_verdict_compares_ends_where_scratch_trained_as_long_in_all(tmp_path):
    make_quickstart(tmp_path, tokens=256, side=12)
    longer = make_run(
        tmp_path / 'longer',
        placement='replace',
        skews=(1.4,),
        steps=200,
        seed=4,
        tokens=256,
        side=12,
    )
    said = verdict(read_runs(tmp_path, ['pretrain', 'add', longer.name]))
    assert said.text.startswith('After 200 steps each in all (100 of add’s without memory)')


def test_verdict_refuses_other_numbers_of_evaluation_tokens(small):
    edit_evals(small / 'replace', lambda record: record | {'eval_tokens': 512})
    said = verdict(read_runs(small))
    assert said.holds is None and 'T = 256 tokens and replace over 512' in said.text


@pytest.mark.slow
def test_every_pair_with_the_same_layers_has_its_verdict(small):
    sizes = dict(tokens=256, side=12)
    make_run(small / 'deep_add', placement='add', init_from=str(small / 'pretrain'), layers=('5',),
             skews=(1.6,), seed=4, **sizes)
    make_run(small / 'deep_replace', placement='replace', layers=('5',), skews=(0.2,), seed=5,
             **sizes)
    make_run(small / 'both_replace', placement='replace', layers=('2', '5'), skews=(0.2,), seed=6,
             **sizes)
    first, second = verdicts(read_runs(small))
    assert first.holds and [run.name for run, _ in first.top1] == ['add', 'replace']
    assert 'T = 256 evaluation tokens, layer 2;' in first.text
    assert second.holds is False
    assert [run.name for run, _ in second.top1] == ['deep_add', 'deep_replace']
    assert 'T = 256 evaluation tokens, layer 5;' in second.text
    page = write_report(small).read_text()
    assert page.count('class="verdict yes"') == page.count('class="verdict no"') == 1


def test_verdict_names_no_winner_between_losses_that_are_not_finite(small):
    edit_evals(small / 'add', lambda record: record | {'loss': math.nan})
    assert '(nan and 6.318) cannot be compared' in verdict(read_runs(small)).text
    assert 'nan' in cells(write_report(small).read_text(), 'Evaluation loss, nats')
