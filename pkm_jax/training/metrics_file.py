"""metrics.jsonl of a run: one JSON object a line, mended where a killed run goes on."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Lines up to a step, and what is appended to them; `notes` says what was found wrong.

    `known` is the `state` that was saved with the checkpoint of that step: the lines there were
    then, of which none may have changed. Those after it, which the run will write again, are cut;
    of a run that begins at step 0 all are. `every` is the greatest distance between lines of
    training.
    """

    def __init__(self, path: Path, step: int, every: int, known: dict[str, Any] | None = None):
        content = path.read_bytes() if path.exists() else b''
        lines, self.notes = _mended(content.splitlines(keepends=True), step, every, known)
        self.lines = [json.loads(line) for line in lines]
        self._count, self._hash = len(lines), hashlib.sha256(b''.join(lines))
        if b''.join(lines) != content:
            unfinished = path.with_suffix('.part')
            unfinished.write_bytes(b''.join(lines))
            unfinished.replace(path)
        self._file = path.open('ab')

    @property
    def state(self) -> dict[str, Any]:
        """How many lines there are, and their hash."""
        return {'lines': self._count, 'sha256': self._hash.hexdigest()}

    def append(self, line: dict[str, Any]) -> None:
        """Writes one line, at once."""
        text = json.dumps(line).encode() + b'\n'
        self._file.write(text)
        self._file.flush()
        self._count += 1
        self._hash.update(text)

    def close(self) -> None:
        self._file.close()


def evaluation_of(run: Path, step: int) -> dict[str, Any]:
    """What a run's weights of that step reached, as its `metrics.jsonl` says; {} if it does not."""
    path = run / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [record for line in lines if (record := _record(line))
             and (record['kind'], record['step']) == ('eval', step)]
    return found[-1] if found else {}


def _mended(lines: list[bytes], step: int, every: int,
            known: dict[str, Any] | None) -> tuple[list[bytes], list[str]]:
    """The lines that stay, and what a person should know of the others."""
    whole = {}      # by kind and step: none is there twice
    for line in lines:
        record = _record(line)
        if record:
            whole[record['kind'], record['step']] = line
    if step == 0:
        last = max((at for _, at in whole), default=0)
        return [], [f'WARNING: there is no checkpoint, though metrics.jsonl reaches step {last:,}: '
                    f'the run begins anew, and so does metrics.jsonl'] if last else []
    if known:
        head = lines[:known['lines']]
        if hashlib.sha256(b''.join(head)).hexdigest() == known['sha256']:
            return head, []
    kept = [line for (_, at), line in whole.items() if at <= step]
    ends = [0, *sorted(at for kind, at in whole if kind == 'train' and at <= step)]
    lost = [f'between steps {before:,} and {after:,}' for before, after in itertools.pairwise(ends)
            if after - before > every]
    if ends[-1] < step:     # there is one of each step that was saved
        lost.append(f'of steps {ends[-1] + 1:,} to {step:,}')
    if not known and ends[-1] == step:      # saved by an earlier version, perhaps at other steps
        return kept, []
    of = f'of its {known["lines"]:,} ' if known else ''
    return kept, [f'WARNING: metrics.jsonl is not what it was at the checkpoint of step {step:,}: '
                  f'{len(kept):,} {of}lines can be read and are kept; '
                  + (f'lines are missing {", ".join(lost)}' if lost else 'some were changed')]


def _record(line: bytes) -> dict[str, Any] | None:
    """What a whole line says, None of others: a killed run can leave half a line."""
    try:
        record = json.loads(line)
        is_one = isinstance(record['kind'], str) and isinstance(record['step'], int)
        return record if is_one and record['step'] >= 0 and line.endswith(b'\n') else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
