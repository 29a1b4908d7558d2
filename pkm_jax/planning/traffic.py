"""What a compiled TPU program moves between HBM and the chip, instruction by instruction.

XLA's cost analysis counts every operand and result, though a TPU's program keeps many of them on
the chip and says so: an array whose layout ends in S(1) lies in its vector memory. Here an
instruction moves those of its operands and results that lie in HBM, once, with the padding of their
tiles:

* of what a fusion slices or gathers, what it takes; of what it changes in place, what it puts;
* of copies and slices that are started the side in HBM; where they end nothing moves;
* of a collective what it is given and results in; fusions that carry its buffers along, and its
  end, move none of them;
* of a loop what its body moves, as often as it runs;
* of a sort that is longer than what the chip holds of it (the compiler says how much) every pass of
  a bitonic sort whose steps over longer distances each read and write all, which is pessimistic;
* of a kernel what its `pl.CostEstimate` says, where it has one.

Operands that a fusion reads twice are not seen: it is what the program moves at least.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from pkm_jax.accelerators import LANES, SUBLANES
from pkm_jax.planning.hlo import ARRAY, ITEM_BITS, KINDS, Module
from pkm_jax.training.layout_time import passes_of_bitonic_sort

_LINE = re.compile(r'(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)')
_CALLED = re.compile(r'(?:calls|to_apply)=%([\w.\-]+)')
_COST = re.compile(r'"bytes_accessed":"?(\d+)')
_SCRATCH = re.compile(r'"used_scoped_memory_configs":\[\{[^}]*"size":"([1-9]\d*)"')
# Patterns, as dynamic_update_slice is an operation of any part.
_SCOPES = {r'\bupdate\b': 'update of parameters, norms', 'retrieval': 'retrieval', 'read': 'read'}
_MOVES_NOTHING = (
    'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'constant', 'call',
    'conditional', 'after-all', 'partition-id', 'copy-done', 'slice-done',
    *(f'{kind}-done' for kind in KINDS))
_CALLS_NOTHING = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer)"')
_SAME = ('bitcast', 'reshape', 'get-tuple-element', 'copy-done')    # of an array, by another name
_TAKES = ('slice', 'dynamic-slice', 'gather')
_PUTS = ('dynamic-update-slice', 'scatter')
_STARTED, _CONTINUED = 'AsyncCollectiveStart', re.compile('^async_collective|AsyncCollectiveDone')


class Moved(NamedTuple):
    """HBM traffic of one instruction, in bytes of one execution of it."""
    name: str
    operation: str
    source: str         # where in the traced program it comes from, as XLA says
    read: int
    written: int
    times: int

    @property
    def bytes(self) -> int:
        return (self.read + self.written) * self.times


class Line(NamedTuple):
    """An instruction of a computation."""
    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    text: str


class Traffic:
    """The HBM traffic of a program."""

    def __init__(self, module: Module):
        #: operands of the instructions counted so far that the program does not define: 0 bytes
        self.unknown: set[str] = set()
        self._module = module
        self._lines = {name: [line for text in texts if (line := _parse(text))]
                       for name, texts in module.computations.items()}
        self._by_name = {line.name: line for lines in self._lines.values() for line in lines}
        self._users: dict[str, list[tuple[Line, str]]] = defaultdict(list)
        for name, lines in self._lines.items():
            for line in lines:
                for operand in set(line.operands):
                    self._users[operand].append((line, name))

    def instructions(self) -> Iterator[Moved]:
        """Those that move anything, with what they move."""
        for text, times in self._module.instructions():
            line = _parse(text)
            if (line is None or line.operation in _MOVES_NOTHING or _CALLS_NOTHING.search(text)
                    or not times):
                continue
            read, written = self._moved(line)
            if read or written:
                source = re.search(r'op_name="([^"]*)"', text)
                yield Moved(line.name, line.operation, source[1] if source else '', read, written,
                            times)

    def by_part(self) -> dict[str, int]:
        """Bytes of one execution of the program, by what of a step they are for, most first."""
        parts: Counter[str] = Counter()
        for one in self.instructions():
            parts[_part(one)] += one.bytes
        return dict(parts.most_common())

    def _moved(self, line):
        """Bytes read and written by an instruction of a computation that is no fusion."""
        cost, sizes = _COST.search(line.text), self._sizes(line.result)
        if cost and line.operation == 'custom-call':
            return int(cost[1]), 0
        given = sum(self._size(name) for name in set(line.operands))
        if line.operation in ('copy-start', 'slice-start'):
            place = int(line.operation == 'slice-start')
            size = _bytes(*ARRAY.findall(line.result)[place])
            return size * bool(given), sizes[place]
        if line.operation.endswith('-start'):
            return given, max(sizes)
        if line.operation == 'sort':
            again = sum(sizes) * (_passes(line) - 1)
            return given + again, sum(sizes) + again
        if line.operation != 'fusion':
            return (self._taken_by(line), self._put(line, sum(sizes)))
        called = _CALLED.search(line.text)[1]
        inner, read = self._lines[called], 0
        if _STARTED in inner[-1].text:
            return given, max(sizes)
        for place, name in enumerate(line.operands):
            read += self._part_of(name, self._taken(_parameter(inner, place), called))
        root = inner[-1]
        if root.operation == 'tuple':
            return read, sum(self._put(self._by_name[name], size)
                             for name, size in zip(root.operands, sizes))
        return read, self._put(root, sum(sizes))

    def _taken_by(self, line):
        """Bytes that an instruction reads of its operands."""
        return sum(self._part_of(name, self._taken_of(line, name)) for name in set(line.operands))

    def _part_of(self, name, taken):
        """Bytes read of an array in HBM of which so many are taken; None: all."""
        return self._size(name) if taken is None else min(taken, self._size(name))

    def _taken(self, name, computation):
        """Bytes that a fused computation takes of an array of its; None: all."""
        taken = 0
        for user, at in self._users[name]:
            if at != computation:
                continue
            is_root = user.text.startswith('ROOT')
            if user.operation in _SAME:
                part = None if is_root else self._taken(user.name, computation)
            elif user.operation == 'tuple' and is_root:
                part = 0        # what is passed on
            elif user.operation == 'fusion' and self._same_as(user):
                part = None if is_root else self._taken(user.name, computation)
            elif user.operation == 'fusion':
                called = _CALLED.search(user.text)[1]
                parts = [self._taken(_parameter(self._lines[called], place), called)
                         for place, operand in enumerate(user.operands) if operand == name]
                part = None if None in parts else sum(parts)
            elif self._continues(computation) and (
                    user.operation in KINDS or user.operation == 'custom-call'):
                part = 0
            else:
                part = self._taken_of(user, name)
            if part is None:
                return None
            taken += part
        return taken

    def _taken_of(self, user, name):
        """Bytes that one instruction takes of an array; None: all."""
        if name != user.operands[0] or name in user.operands[1:]:
            return None
        if user.operation in _TAKES:
            return _whole(user.result)
        if user.operation == 'dynamic-update-slice':
            return 0
        return _whole(self._update(user).result) if user.operation == 'scatter' else None

    def _put(self, line, size):
        """Bytes written of a result of `size` bytes in HBM."""
        if not size:
            return 0
        if line.operation in _SAME:
            return self._put(self._by_name[line.operands[0]], size)
        if line.operation == 'parameter':       # passed on
            return 0
        if line.operation in _PUTS:
            return min(_whole(self._update(line).result), size)
        if line.operation == 'fusion':
            same = self._same_as(line)
            return self._put(same or self._lines[_CALLED.search(line.text)[1]][-1], size)
        if 'AsyncCollectiveDone' in line.text:
            return 0
        return 0 if line.operation in KINDS and self._in_continuation(line) else size

    def _same_as(self, fusion):
        """What makes the operand that a fusion gives another name or shape and nothing else."""
        root = self._lines[_CALLED.search(fusion.text)[1]][-1]
        while root.operation in _SAME:
            root = self._by_name[root.operands[0]]
        if root.operation == 'parameter':
            place = int(root.text.split(' parameter(')[1].split(')')[0])
            return self._by_name[fusion.operands[place]]
        return None

    def _update(self, line):
        """What a scatter or dynamic-update-slice puts."""
        return self._by_name[line.operands[1 if line.operation == _PUTS[0] else -1]]

    def _in_continuation(self, line):
        return any(line in lines and self._continues(name) for name, lines in self._lines.items())

    def _continues(self, computation):
        """Whether a fusion carries a collective along, or ends it."""
        root = self._lines[computation][-1].text
        return bool(_CONTINUED.search(computation)) or 'AsyncCollectiveDone' in root

    def _size(self, name):
        """Bytes of a named result, in HBM."""
        if name not in self._by_name:
            self.unknown.add(name)
            return 0
        return sum(self._sizes(self._by_name[name].result))

    def _sizes(self, result):
        return ['S(' not in array[2] and _bytes(*array) for array in ARRAY.findall(result)] or [0]


def _part(one):
    """By the named scopes of a step, and what differentiates it."""
    if one.operation in ('copy-start', 'slice-start'):
        return 'arrays on their way between the chip and HBM, early or until later'
    if one.operation in KINDS or 'async-collective' in one.name:
        return 'what collectives take and leave'
    backward = 'transpose(' in one.source
    for scope, part in _SCOPES.items():
        if re.search(scope, one.source):
            return part + (', backward' if backward else '')
    return 'model' + (', backward' if backward else '')


def _parse(text: str) -> Line | None:
    match = _LINE.match(text)
    if match is None:
        return None
    name, result, operation, rest = match.groups()
    operands = tuple(re.findall(r'%([\w.\-]+)', rest.split(')')[0]))
    return Line(name, result, operation, operands, text)


def _parameter(lines, place):
    """The name of a computation's parameter."""
    return next(line.name for line in lines if f' parameter({place})' in line.text)


def _passes(sort):
    """Passes of a sort through HBM."""
    arrays, along = ARRAY.findall(sort.result), int(re.search(r'dimensions=\{(\d+)', sort.text)[1])
    dims = [int(size) for size in arrays[0][1].split(',')]
    minor = int(re.match(r'\d+', arrays[0][2] or '0')[0])
    beside = 1 if len(dims) == 1 else SUBLANES if along == minor else LANES
    size = dims[along] * beside * sum(ITEM_BITS[dtype] // 8 for dtype, _, _ in arrays)
    scratch = _SCRATCH.search(sort.text)
    return passes_of_bitonic_sort(size, int(scratch[1])) if scratch else 1


def _whole(result):
    return sum(_bytes(*array) for array in ARRAY.findall(result))


def _bytes(dtype, dims, layout):
    """Of an array as it lies in its tiles: '1,0:T(8,128)(2,1)' fills 128 columns and 8 rows up."""
    dims = [int(size) for size in dims.split(',') if size]
    order = [int(axis) for axis in re.match(r'[\d,]*', layout)[0].split(',') if axis]
    tile = re.search(r'T\(([\d,]+)\)', layout)
    sizes = [int(size) for size in tile[1].split(',')] if tile else []
    for axis, size in zip(order, reversed(sizes)):
        dims[axis] = -(-dims[axis] // size) * size
    return math.prod(dims) * ITEM_BITS[dtype] // 8
