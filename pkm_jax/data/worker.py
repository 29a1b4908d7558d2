"""What a process does for another that prepares text (`workers.py`): it cuts, and it serialises.

Run as a file, and imports nothing of the package, so that many of them start at once.
"""

import os
import pickle
import signal
import sys
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

Tokens = np.ndarray     # of int32


def tokenizer_of(description: str) -> Tokenizer:
    """What cuts text, from the content of a tokenizer.json; the names of special tokens within a
    text are text."""
    tokenizer = Tokenizer.from_str(description)
    tokenizer.encode_special_tokens = True
    return tokenizer


def cut(
    tokenizer: Tokenizer, texts: list[str], unk: int | None,
) -> tuple[Tokens, Tokens, int, list[str]]:
    """The tokens of texts one after another, how many each has, how many are `unk`, and the words
    behind these in the text that has most of them."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(
        texts, add_special_tokens=False)]
    sizes = np.array([len(ids) for ids in encoded], np.int32)
    tokens = np.fromiter((token for ids in encoded for token in ids), np.int32, int(sizes.sum()))
    numbers = [] if unk is None else [ids.count(unk) for ids in encoded]
    words = []
    if most := max(numbers, default=0):
        text = texts[numbers.index(most)]
        found = tokenizer.encode(text, add_special_tokens=False)
        words = [text[first:last] for token, (first, last) in zip(found.ids, found.offsets)
                 if token == unk]
    return tokens, sizes, sum(numbers), words


def serialised(_: Tokenizer, records: Tokens) -> list[bytes]:
    """Records [n, length] as TFDS writes {'tokens': record}: each a tf.train.Example, whose numbers
    are varints of seven bits a byte (protobuf.dev/programming-guides/encoding)."""
    rest = records[..., None] >> 7 * np.arange(5)       # of 31 bits
    in_use, more = rest > 0, rest[..., 1:] > 0
    in_use[..., 0] = True
    rest &= 127
    rest[..., :-1] |= more * 128
    numbers = rest.astype(np.uint8)[in_use].tobytes()
    ends = np.cumsum(in_use.sum((1, 2))).tolist()
    return [_example(numbers[start:end]) for start, end in zip([0, *ends], ends)]


def _example(numbers: bytes) -> bytes:
    feature = _field(3, _field(1, numbers))
    return _field(1, _field(1, _field(1, b'tokens') + _field(2, feature)))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, *_varint(len(content))]) + content


def _varint(number: int) -> Iterator[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number


def ignore_signals() -> None:
    """Leaves the signals that stop a run to the parent, which ends its workers when it is done.

    Ctrl-C and many launchers signal all processes.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Answers requests (name of a function, arguments) until there are no more, or nobody reads."""
    ignore_signals()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)       # what a library prints is no answer
    tokenizer = tokenizer_of(pickle.load(requests))
    while True:
        try:
            name, arguments = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):      # the parent has ended, at any moment
            return
        answer = pickle.dumps(globals()[name](tokenizer, *arguments), pickle.HIGHEST_PROTOCOL)
        try:
            answers.write(answer)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)         # else Python would try again to flush


if __name__ == '__main__':
    main()
