"""What of a classification no whole run shows: weights of classes, rows without an example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pkm_jax.data.columns import balanced, held_out, label_names
from pkm_jax.data.loader import evaluation_batches
from pkm_jax.models.bert import BertConfig
from pkm_jax.refusal import Refusal
from pkm_jax.tasks.classification import Classification
from tests.conftest import WORDS

MODEL = BertConfig(vocab_size=5 + len(WORDS), layers=1, width=8, attention_heads=2,
                   feed_forward_width=8, max_length=16, dropout=0., attention_dropout=0.)


@pytest.fixture
def prepared(tiny_bert, tmp_path):
    """A task with 8 examples, of which one has the rarer class, and its data."""
    def prepare(**settings):
        path = tmp_path / 'a.csv'
        path.write_text('text,label\n' + ''.join(
            f'{" ".join(WORDS[:number])},{"rare" if number == 3 else "often"}\n'
            for number in range(1, 9)))
        task = Classification(train=str(path), validation=str(path), length=16, **settings)
        data = task.prepare(str(tiny_bert), lambda line: None)
        return task.of_data(data), data
    return prepare


def test_balanced_weights_have_mean_1_and_give_both_classes_the_same_share(prepared):
    task, data = prepared(class_weights='balanced')
    weights = {name: sum(record['loss_weights'] for record in data.records('train')
                         if task.labels[record['labels']] == name) for name in task.labels}
    assert weights == {'often': pytest.approx(4.), 'rare': pytest.approx(4.)}
    np.testing.assert_allclose(balanced([0, 0, 0, 2], 3), [2 / 3, 0, 2])


def test_rows_without_an_example_count_for_nothing(prepared):
    """The loss over 8 examples, in one batch and with the last rows of two batches filled."""
    task, data = prepared()
    config = task.head(MODEL)
    model = config.build(nnx.Rngs(0))
    outcome = jax.jit(lambda batch: task.outcome(model, batch, deterministic=True)[:2])
    totals = []
    for size in (8, 5):
        batches = [jax.tree.map(jnp.asarray, batch) for batch in evaluation_batches(
            data, 'train', task.examples(data, 0), batch_size=size, n_batches=9, seed=0,
            buckets=(16,))]
        assert len(batches) == -(-8 // size)
        totals.append((sum(float(outcome(batch)[0]) for batch in batches),
                       sum(float(task.terms(batch)) for batch in batches)))
    assert totals[0][1] == totals[1][1] == 8
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)


def test_one_name_is_no_choice():
    with pytest.raises(Refusal, match=r"data.labels = \('a',\): name two"):
        Classification(labels=('a',))
    Classification(labels=('a',), problem='multi_label')


def test_names_and_held_out_examples():
    assert label_names([['10'], ['9'], ['2']]) == ('2', '9', '10')
    assert label_names([['b', 'a'], ['10']]) == ('10', 'a', 'b')
    train, validation = held_out(10, .25)
    assert sorted([*train, *validation]) == list(range(10)) and len(validation) == 2
    assert [len(part) for part in held_out(2, .01)] == [1, 1]
