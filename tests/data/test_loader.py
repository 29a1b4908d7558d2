import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pkm_jax.data import loader, tokenizer
from pkm_jax.data.examples import MaskedExamples
from pkm_jax.data.loader import BatchStream, evaluation_batches
from pkm_jax.data.masking import Masking
from pkm_jax.refusal import Refusal

OPTIONS = dict(batch_size=12, seed=3)


def masked(prepared, seed: int, rate: float = 0.15, whole_word: bool = False,
           slots: int = 5) -> MaskedExamples:
    """Examples of records of 32 tokens; five slots hold 15 % of them."""
    return MaskedExamples(Masking(tokenizer.load(prepared.vocab_path), seed, rate, whole_word,
                                  slots, 32))


def stream_of(prepared, **options) -> BatchStream:
    """The training stream of OPTIONS, changed by `options`."""
    options = OPTIONS | options
    return BatchStream(prepared, 'train', masked(prepared, options['seed']), **options)


def take(stream, number: int) -> list[dict]:
    return list(itertools.islice(stream, number))


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def join_hosts(parts: list[list[dict]]) -> list[dict]:
    """The global batches, from those of every host."""
    return [{name: np.concatenate([part[name] for part in step]) for name in step[0]}
            for step in zip(*parts, strict=True)]


def unmasked(batch: dict) -> np.ndarray:
    """The tokens before masking."""
    tokens = batch['tokens'].copy()
    rows, slots = np.nonzero(batch['mlm_weights'])
    tokens[rows, batch['mlm_positions'][rows, slots]] = batch['mlm_labels'][rows, slots]
    return tokens


def epoch_steps(prepared) -> int:
    """A number of batches that reaches into the second epoch."""
    return prepared.num_train // OPTIONS['batch_size'] + 3


def test_shapes_types_and_padding(prepared):
    batch = next(BatchStream(prepared, 'train', masked(prepared, 0, slots=9), batch_size=6, seed=0))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        'tokens': ((6, 32), np.int32), 'segments': ((6, 32), np.int32), 'lengths': ((6,), np.int32),
        'mlm_positions': ((6, 9), np.int32), 'mlm_labels': ((6, 9), np.int32),
        'mlm_weights': ((6, 9), np.float32)}
    predicted = batch['mlm_weights'].sum(axis=1)
    assert ((predicted >= 1) & (predicted <= 5)).all()   # 15 % of at most 30 tokens are 4.5
    assert (batch['mlm_positions'] < batch['lengths'][:, None]).all()
    assert (batch['tokens'] == tokenizer.load(prepared.vocab_path).ids['[MASK]']).any()


def test_an_epoch_passes_every_record_once_in_an_order_of_its_own(prepared):
    size = prepared.num_train
    batches = take(stream_of(prepared), 2 * size // OPTIONS['batch_size'] + 1)
    rows = np.concatenate([unmasked(batch) for batch in batches])
    expected = sorted(tuple(record['tokens']) for record in prepared.records('train'))
    for epoch in (rows[:size], rows[size:2 * size]):
        assert sorted(tuple(token for token in row if token) for row in epoch.tolist()) == expected
    assert (rows[:size] != rows[size:2 * size]).any()


def test_masks_differ_between_epochs(prepared):
    first, second = {}, {}
    batches = take(stream_of(prepared), 2 * prepared.num_train // OPTIONS['batch_size'])
    for batch in batches:
        for text, masked in zip(unmasked(batch), batch['tokens']):
            (second if text.tobytes() in first else first)[text.tobytes()] = masked
    same = [np.array_equal(first[text], second[text]) for text in second]
    assert len(same) > 100 and np.mean(same) < 0.02


def test_masks_are_those_of_seed_epoch_and_record(prepared):
    masking = Masking(tokenizer.load(prepared.vocab_path), 3, 0.15, False, 5, 32)
    numbers = {record['tokens'].tobytes(): number
               for number, record in enumerate(prepared.records('train'))}
    batches = take(stream_of(prepared), epoch_steps(prepared))
    rows = [(text[:length], tokens[:length]) for batch in batches
            for text, tokens, length in zip(unmasked(batch), batch['tokens'], batch['lengths'])]
    for position, (text, tokens) in enumerate(rows):
        epoch = position // prepared.num_train
        expected, _, _ = masking(text, epoch, numbers[text.tobytes()])
        np.testing.assert_array_equal(tokens, expected)


def test_worker_processes_do_not_change_the_stream(prepared):
    steps = epoch_steps(prepared)
    with_workers = stream_of(prepared, workers=2)
    assert_same(take(with_workers, steps), take(stream_of(prepared), steps))
    with_workers.close()


def test_what_is_begun_early_is_the_same_stream(prepared):
    """A place counts what was returned; what was begun is left where the place is set."""
    whole, stream = take(stream_of(prepared), 7), stream_of(prepared, workers=1)
    stream.begin()
    stream.begin()
    assert stream.get_state() == stream_of(prepared).get_state()
    assert_same(take(stream, 3), whole[:3])
    state = stream.get_state()
    take(stream, 1)
    stream.set_state(state)
    stream.begin()
    assert_same(take(stream, 4), whole[3:])
    stream.close()
    assert not multiprocessing.active_children()


@dataclasses.dataclass(frozen=True)
class Marking:
    """Examples that make a file."""
    real: MaskedExamples
    path: Path

    def __call__(self, *record):
        self.path.touch()
        return self.real(*record)

    @property
    def arrays(self):
        return self.real.arrays

    @property
    def identity(self):
        return self.real.identity


def test_what_is_begun_is_made_before_it_is_asked_for_and_ended_if_that_is_interrupted(
        prepared, tmp_path, monkeypatch):
    mark = tmp_path / 'made'
    stream = BatchStream(prepared, 'train', Marking(masked(prepared, 3), mark), workers=1,
                         **OPTIONS)
    stream.begin()
    end = time.monotonic() + 60
    while not mark.exists():
        assert time.monotonic() < end
        time.sleep(.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(stream._first), 'result', interrupted)
        next(stream)
    stream.close()
    assert not multiprocessing.active_children()


def test_closing_waits_for_what_is_begun_and_ends_it(prepared, monkeypatch):
    class Slow:
        closed = False

        def __next__(self):
            time.sleep(.3)

        def close(self):
            self.closed = True

    slow = Slow()
    monkeypatch.setattr(loader, '_iterate', lambda *_: time.sleep(.3) or slow)
    stream = stream_of(prepared, workers=1)
    stream.begin()
    stream.close()
    assert slow.closed


def interrupted(future, timeout=None):
    raise KeyboardInterrupt


def test_workers_leave_signals_to_their_parent(prepared):
    """Ctrl-C reaches them too, and the parent wants more batches before it stops."""
    stream = stream_of(prepared, workers=2)
    take(stream, 2)     # one of each
    workers = multiprocessing.active_children()
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid, number)
    take(stream, 30)    # more than is prefetched
    assert all(worker.is_alive() for worker in workers)     # none was replaced
    stream.close()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(prepared):
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, __file__], env=environment, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as parent:
        parent.stdin.write(pickle.dumps(prepared))
        parent.stdin.flush()
        workers = parent.stdout.readline().split()
        parent.kill()
        assert len(workers) == 2
        parent.communicate(timeout=20)      # returns when no worker holds the pipe any more


@pytest.mark.slow
def test_a_run_that_ends_leaves_python_nothing_to_warn_of(prepared):
    """No semaphores that its workers shared."""
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__, 'ends'], env=environment,
                          input=pickle.dumps(prepared), capture_output=True, timeout=60)
    assert done.returncode == 0 and b'leaked' not in done.stderr, done.stderr


def test_a_worker_that_dies_is_named_and_replaced(prepared, caplog):
    """The stream goes on as if it had not; one that dies again and again ends it."""
    whole, stream = take(stream_of(prepared), 30), stream_of(prepared, workers=1)
    start = take(stream, 2)
    worker, = multiprocessing.active_children()
    worker.kill()
    assert_same(start + take(stream, 28), whole)
    assert re.search(r'loader process .* ended by SIGKILL before batch \d+.* begun again', caplog.text)
    stream.close()


@pytest.mark.slow
@pytest.mark.parametrize('early', [False, True])
def test_a_worker_that_dies_again_at_the_same_batch_ends_the_stream(prepared, monkeypatch, early):
    stream = stream_of(prepared, workers=1)
    monkeypatch.setattr(loader, '_leave_signals_to_parent', end_at_once)
    if early:
        stream.begin()
    with pytest.raises(loader.LoaderDied, match='ended with status 3 before batch 1'):
        next(stream)


def end_at_once(worker, workers):
    os._exit(3)


@pytest.mark.parametrize('hosts', [2, 3])
def test_the_parts_of_the_hosts_make_up_the_batch_of_one(prepared, hosts):
    steps = epoch_steps(prepared)
    parts = [take(stream_of(prepared, process_index=index, process_count=hosts), steps)
             for index in range(hosts)]
    assert_same(join_hosts(parts), take(stream_of(prepared), steps))


def test_resuming_gives_the_very_same_stream(prepared):
    steps = epoch_steps(prepared)
    whole = take(stream_of(prepared), steps + 5)
    for taken in (0, 1, 5, steps - 4, steps):   # the last ones around the end of the epoch
        stream = stream_of(prepared)
        take(stream, taken)
        state = json.loads(json.dumps(stream.get_state()))
        resumed = stream_of(prepared)
        next(resumed)   # it had begun elsewhere
        resumed.set_state(state)
        assert_same(take(resumed, 5), whole[taken:taken + 5])
        assert_same(take(stream, 5), whole[taken:taken + 5])   # undisturbed by get_state


def test_resuming_on_other_hosts_and_workers_gives_the_very_same_stream(prepared):
    whole = take(stream_of(prepared), 8)
    stream = stream_of(prepared, process_index=1, process_count=2)
    take(stream, 5)
    resumed = stream_of(prepared, workers=1)
    resumed.set_state(stream.get_state())
    assert_same(take(resumed, 3), whole[5:])
    resumed.close()


def test_a_state_of_another_stream_is_refused(prepared):
    state = stream_of(prepared).get_state()
    with pytest.raises(Refusal, match='seed was 3, is 4'):
        stream_of(prepared, seed=4).set_state(state)
    with pytest.raises(Refusal, match='batch_size was 12, is 24'):
        stream_of(prepared, batch_size=24).set_state(state)
    others = BatchStream(prepared, 'train', masked(prepared, 3, 0.1, whole_word=True), **OPTIONS)
    with pytest.raises(Refusal, match='mask_rate was 0.15, is 0.1, whole_word was False, is True'):
        others.set_state(state)


def test_evaluation_is_over_fixed_records_with_fixed_masks(prepared):
    options = dict(batch_size=8, n_batches=3, seed=5)
    batches, again = (
        list(evaluation_batches(prepared, 'validation', masked(prepared, 5), **options))
        for _ in range(2))
    assert len(batches) == 3
    assert_same(batches, again)


@pytest.mark.parametrize('hosts', [1, 2])
def test_evaluation_covers_the_split_once_and_fills_the_last_batch_with_empty_rows(prepared, hosts):
    size, batch_size = prepared.num_validation, 10
    assert size % batch_size, 'choose a batch size that leaves a rest'
    parts = [list(evaluation_batches(
        prepared, 'validation', masked(prepared, 5), batch_size=batch_size, n_batches=1_000, seed=5,
        process_index=index, process_count=hosts)) for index in range(hosts)]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    batches = join_hosts(parts)
    lengths = np.concatenate([batch['lengths'] for batch in batches])
    assert (lengths[:size] > 0).all() and (lengths[size:] == 0).all()
    assert batches[-1]['mlm_weights'][size % batch_size:].sum() == 0
    rows = np.concatenate([unmasked(batch) for batch in batches])[:size]
    assert (sorted(tuple(token for token in row if token) for row in rows.tolist())
            == sorted(tuple(record['tokens']) for record in prepared.records('validation')))


def test_whole_words_and_rates_reach_the_batches(prepared):
    vocabulary = tokenizer.load(prepared.vocab_path)
    batches = take(BatchStream(
        prepared, 'train', masked(prepared, 3, 0.4, whole_word=True, slots=13), **OPTIONS), 20)
    share = sum(batch['mlm_weights'].sum() for batch in batches) / sum(
        (~vocabulary.special[unmasked(batch)]).sum() for batch in batches)
    assert abs(share - 0.4) < 0.03
    for batch in batches:
        for text, positions, weights in zip(unmasked(batch), batch['mlm_positions'],
                                            batch['mlm_weights']):
            chosen = set(positions[weights > 0].tolist())
            assert chosen.issuperset(place + 1 for place in chosen if place + 1 < 32
                                     and vocabulary.continuation[text[place + 1]])


def test_what_goes_to_a_worker_is_small(prepared):
    stream = stream_of(prepared)
    next(stream)
    collate = stream._batches._map_fn
    assert len(pickle.dumps(collate)) < 30_000 and '_opened' not in collate.__getstate__()


def test_unusable_settings_are_refused(prepared):
    with pytest.raises(Refusal, match='batch of 12 does not divide over 5 hosts'):
        stream_of(prepared, process_count=5)
    with pytest.raises(Refusal, match='max_predictions is 2'):
        masked(prepared, 3, slots=2)


if __name__ == '__main__':      # the parent that is killed, or ends
    given = stream_of(pickle.load(sys.stdin.buffer), workers=2)
    take(given, 2)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1:] == ['ends']:
        given.close()
        sys.exit()
    time.sleep(100)
