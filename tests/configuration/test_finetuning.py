"""Configurations of fine-tuning, and the runs that they ask for once data are read."""

import numpy as np
import pytest

from configs import bert_base_pkm, conll, glue, squad, text
from pkm_jax.configuration.finetuning import each, runs_of
from pkm_jax.configuration.resolve import runs_of as runs_of_pretraining
from pkm_jax.configuration.resolve import task_of
from pkm_jax.configuration.run import Train
from pkm_jax.data.labelled import Labelled, Records
from pkm_jax.models.bert import BertConfig
from pkm_jax.refusal import Refusal

SOURCE = BertConfig(vocab_size=40, layers=2, width=16, attention_heads=2, feed_forward_width=16,
                    max_length=128)
DATA = Labelled('', 40, {name: Records([{'tokens': np.zeros(20, np.int32)}] * size)
                         for name, size in (('train', 100), ('validation', 33))},
                {'train': (None, ('a', 'b', 'c'))})


def runs(config, source=SOURCE):
    config = config.to_dict()
    return runs_of(config, task_of(config).of_data(DATA), DATA, source)


def test_the_recipe_that_run_glue_is_known_by():
    run, = runs(text.get_config())
    assert (run.train.batch, run.task.length, run.train.learning_rate) == (32, 128, 2e-5)
    assert run.train.steps == 3 * 4 and run.train.warmup == 1 and run.train.best == 'accuracy'
    assert run.log.eval_every == run.log.checkpoint_every == 4 and run.log.eval_batches == 2
    assert run.model.output_heads == ('pooler', 'classifier') and run.model.classes == 3
    assert run.task.labels == ('a', 'b', 'c') and run.task.buckets == (32,)
    assert run.model.layers == 2 and not run.log.eval_at_start


def test_a_grid_has_a_folder_for_each():
    config = text.get_config()
    config.finetune.update(seeds=(1, 2), learning_rates=(2e-5, 5e-5))
    found = [(run.workdir, run.seed, run.train.learning_rate) for run in runs(config)]
    assert found == [('runs/text/lr2e-05-seed1', 1, 2e-5), ('runs/text/lr2e-05-seed2', 2, 2e-5),
                     ('runs/text/lr5e-05-seed1', 1, 5e-5), ('runs/text/lr5e-05-seed2', 2, 5e-5)]


def test_memories_of_the_weights_and_others():
    """Those of the weights stay; one is placed where they have none, never another."""
    placed = text.get_config()
    placed.memory.update(placement='add', layers=(1,), sub_keys=6, heads=2, top_k=3, query_width=8)
    run, = runs(placed)
    assert run.model.memory_layers == (1,) and run.log.eval_at_start
    again, = runs(text.get_config(), source=run.model)
    assert again.model.memory == run.model.memory and again.model.placement == 'add'
    assert runs(placed, source=run.model)[0].model.memory_layers == (1,)
    placed.memory.top_k = 2
    with pytest.raises(Refusal, match=r'have a memory in layers \(1,\)'):
        runs(placed, source=run.model)


def test_all_of_glue():
    found = dict(each(glue.get_config('task=all').to_dict()))
    assert len(found) == 9 and found['qnli']['workdir'] == 'runs/glue/qnli'
    tasks = {name: task_of(one) for name, one in found.items()}
    assert tasks['stsb'].problem == 'regression' and tasks['stsb'].metric == 'combined_score'
    assert tasks['cola'].metric == 'matthews_correlation' and tasks['mnli'].text_pair == 'sentence2'
    assert tasks['mnli'].score({'validation': {'accuracy': .8}, 'validation_mm': {'accuracy': .9},
                                'test': {}}) == pytest.approx(.85)


def test_questions_and_words():
    assert task_of(squad.get_config('version=2').to_dict()).unanswerable
    config = squad.get_config().to_dict()
    assert not task_of(config).unanswerable and config['data']['length'] == 384
    assert task_of(conll.get_config().to_dict()).label_column == -1


@pytest.mark.parametrize('make, message', [
    (lambda: glue.get_config('task=ax'), 'AX belong to mnli'),
    (lambda: squad.get_config('version=3'), 'version=1 or version=2'),
    (lambda: runs_of_pretraining(text.get_config()), 'one of fine-tuning'),
    (lambda: list(each(bert_base_pkm.get_config().to_dict())), 'one of pretraining'),
])
def test_what_is_not_there_is_refused(make, message):
    with pytest.raises(Refusal, match=message):
        make()


@pytest.mark.parametrize('section, changes, message', [
    ('finetune', dict(seeds=(1, 1)), 'seeds = .* each once'),
    ('finetune', dict(epochs=0.), 'finetune.epochs = 0.0 must be above 0'),
    ('train', dict(freeze='all'), "train.freeze = 'all' is none of"),
    ('data', dict(length=256), 'exceeds the 128 positions'),
    ('data', dict(buckets=(64, 32)), r'buckets = \(64, 32\) must ascend'),
    ('data', dict(buckets=(16,)), 'a sequence has 20 tokens'),
    ('data', dict(problem='numbers'), "data.problem = 'numbers' is none of"),
])
def test_impossible_settings_are_refused(section, changes, message):
    config = text.get_config()
    config[section].update(changes)
    with pytest.raises(Refusal, match=message):
        runs(config)


def test_patience_needs_a_metric():
    with pytest.raises(Refusal, match="train.patience = 2, but train.best = ''"):
        Train(patience=2)
