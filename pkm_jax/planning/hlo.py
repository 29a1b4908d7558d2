"""What a compiled program sends between devices, and how often loops run, from its HLO text."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pkm_jax.memory.embedding_bag import OWN_READS, SKEWED_READS

ITEM_BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16,
             'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64}
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
ARRAY = re.compile(r'\b(' + '|'.join(ITEM_BITS) + r')\[([\d,]*)\](?:\{([^}]*)\})?')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join([*KINDS, "all-reduce-scatter"])})(-start)?\(')
# What the runtime exchanges between slices, beside what the program does within one of them.
_BETWEEN_SLICES = re.compile(r' = \((.*?), .* send\(.*_xla_megascale_transfer_type="(\w+)"')
_CALLED = re.compile(r'(?:calls|\w+_computations?)=(%[\w.\-]+|\{.*?\})')
_APPLIED = re.compile(r'to_apply=(%[\w.\-]+)')
# Asynchronous collectives of a TPU are spread over several fusions, each of which names it: the one
# that starts it counts.
_CONTINUED = re.compile(r'^async_collective_fusion|custom_call_target="AsyncCollectiveDone"')
# A reduce-scatter of a TPU is a fusion of this name around an all-reduce.
_SCATTERED = 'all-reduce-scatter'


class Shape(NamedTuple):
    """An array of a program; bytes without the padding of its layout."""
    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * ITEM_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f'{self.dtype}[{",".join(map(str, self.dims))}]'


class Instruction(NamedTuple):
    text: str
    times: int          # executions of it in one of the program


class Collective(NamedTuple):
    """A collective operation: every group of devices exchanges arrays of these shapes."""
    kind: str
    shapes: tuple[Shape, ...]       # of the exchanged whole: what a gather gives, a scatter takes
    groups: tuple[tuple[int, ...], ...]     # of positions in the mesh
    times: int

    @property
    def bytes_sent(self) -> float:
        """By one device in all executions, on a ring: what no algorithm can do with less."""
        whole = sum(shape.bytes for shape in self.shapes)
        if self.kind == 'collective-permute':
            return float(whole * self.times)
        others = 1 - 1 / len(self.groups[0])
        return whole * others * (2 if self.kind == 'all-reduce' else 1) * self.times

    def axes(self, mesh_shape: dict[str, int]) -> str:
        """The axes of the mesh that it exchanges along: 'rows × columns', or 'N devices'."""
        ids = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
        split = [axis for axis, size in mesh_shape.items() if size > 1]
        for count in range(1, len(split) + 1):
            for axes in itertools.combinations(split, count):
                if set(map(frozenset, self.groups)) <= set(
                        map(frozenset, _along(ids, list(mesh_shape), axes))):
                    return ' × '.join(axes)
        return f'{len(self.groups[0])} devices'


class Module:
    """The computations of a compiled program, from its text as `compiled.as_text()` gives it.

    `own_reads`: iterations of the loops that `embedding_bag.OWN_READS` names, which data decides;
    those that SKEWED_READS names have none, as if reads are spread evenly.
    With several slices it is the program of one, whose devices have the first numbers of the mesh.
    """

    def __init__(self, text: str, own_reads: int | None = None, slices: int = 1):
        self._own_reads, self._slices = own_reads, slices
        self.computations: dict[str, list[str]] = {}
        self._entry, lines = '', []
        for line in text.splitlines():
            heading = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
            if heading:
                lines = self.computations.setdefault(heading[2], [])
                self._entry = heading[2] if heading[1] else self._entry
            elif line.startswith('  '):
                lines.append(line.strip())

    def instructions(self) -> Iterator[Instruction]:
        """Those of the program and of what it calls, but for the inside of fusions."""
        return self._called_by(self._entry, 1)

    def collectives(self, devices: int) -> list[Collective]:
        """Every collective operation between more than one of that many devices."""
        found = (_collective(*instruction, devices // self._slices)
                 or _between_slices(*instruction, devices // self._slices, self._slices)
                 for instruction in self._called_by(self._entry, 1, fused=True))
        return [one for one in found if one and len(one.groups[0]) > 1]

    def unknown_loops(self) -> int:
        """How many loops end when data says so; their bodies are counted once."""
        return sum(self._trips(text) is None for text, _ in self.instructions()
                   if ' while(' in text)

    def _called_by(self, name: str, times: int, fused: bool = False) -> Iterator[Instruction]:
        """Those of a computation and of what it calls; of fusions the inside only if asked for."""
        for text in self.computations[name]:
            if name.startswith(_SCATTERED):
                text = text.replace(' all-reduce(', f' {_SCATTERED}(')
            yield Instruction(text, times)
            if ' while(' in text:
                body = re.search(r'body=%?([\w.\-]+)', text)[1]
                trips = self._trips(text)
                yield from self._called_by(body, times * (1 if trips is None else trips), fused)
            called = _CALLED.findall(text) + (_APPLIED.findall(text) if ' call(' in text else [])
            for callee in re.findall(r'%([\w.\-]+)', ' '.join(called)):
                if (fused or ' fusion(' not in text) and not self._continues(callee):
                    yield from self._called_by(callee, times, fused)

    def _trips(self, text):
        """Iterations of a loop: as it says, or the one number that its condition compares with."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', text)
        if known:
            return int(known[1])
        condition = self.computations[re.search(r'condition=%?([\w.\-]+)', text)[1]]
        numbers = re.findall(r's32\[\]\S* constant\((\d+)\)', '\n'.join(condition))
        if len(numbers) == 1:
            return int(numbers[0])
        return 0 if SKEWED_READS in text else self._own_reads if OWN_READS in text else None

    def _continues(self, name):
        return bool(_CONTINUED.search('\n'.join([name, *self.computations[name]])))


def _collective(text, times, devices):
    match = _COLLECTIVE.search(text)
    if not match:
        return None
    result, kind, start = match.groups()
    shapes, groups = _shapes(result), _groups(text, devices)
    if start and kind != 'all-reduce':      # (operands, results, semaphores)
        shapes = [max(shapes, key=lambda shape: shape.bytes)]
    elif kind == 'reduce-scatter':
        shapes = [shape._replace(dims=(shape.dims[0] * len(groups[0]), *shape.dims[1:]))
                  for shape in shapes]
    kind = 'reduce-scatter' if kind == _SCATTERED else kind
    return Collective(kind, tuple(shapes), groups, times)


def _between_slices(text, times, devices, slices):
    match = _BETWEEN_SLICES.search(text)
    if not match:
        return None
    kind, shapes = match[2].lower().replace('_', '-'), _shapes(match[1])
    if kind == 'all-gather':
        shapes = [shape._replace(dims=(shape.dims[0] * slices, *shape.dims[1:]))
                  for shape in shapes]
    groups = np.arange(devices * slices).reshape(slices, devices).T.tolist()
    return Collective(kind, tuple(shapes), tuple(map(tuple, groups)), times)


def _shapes(text: str) -> list[Shape]:
    return [Shape(dtype, tuple(map(int, filter(None, dims.split(',')))))
            for dtype, dims, _ in ARRAY.findall(text)]


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, in any of the ways in which HLO writes them."""
    pairs = re.search(r'source_target_pairs=\{(.*?\})\}', text)
    if pairs:
        return _merged(_lists(pairs[1]))
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\)\))? \{(.*?)\}", text)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2] or f'[{math.prod(sizes.values())}]')
        return _along(ids.reshape(tuple(sizes.values())), list(sizes),
                      re.findall(r"'(\w+)'", mesh[3]))
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=(\S+)', text)
    if iota:
        ids = _iota(iota[2]).reshape(tuple(map(int, iota[1].split(','))))
        return tuple(map(tuple, ids.tolist()))
    lists = re.search(r'replica_groups=\{(\{.*?\})\}', text)
    return _lists(lists[1]) if lists else (tuple(range(devices)),)


def _iota(text):
    """Positions in the order that '[4,64]T(1,0' gives: numbered in that shape, then transposed."""
    numbers = [tuple(map(int, part.split(','))) for part in re.findall(r'[\d,]*\d', text)]
    return np.arange(math.prod(numbers[0])).reshape(numbers[0]).transpose(*numbers[1:])


def _lists(text):
    return tuple(tuple(map(int, ids.split(','))) for ids in re.findall(r'\{([\d,]+)\}', text))


def _along(
    ids: np.ndarray, names: Sequence[str], axes: Sequence[str],
) -> tuple[tuple[int, ...], ...]:
    """The groups of positions that differ along some of the named axes only."""
    chosen = [names.index(axis) for axis in axes]
    rest = [axis for axis in range(ids.ndim) if axis not in chosen]
    size = math.prod(ids.shape[axis] for axis in chosen)
    return tuple(map(tuple, ids.transpose(*rest, *chosen).reshape(-1, size).tolist()))


def _merged(pairs):
    """Pairs of sources and targets as the groups that they connect."""
    groups = {device: frozenset([device]) for pair in pairs for device in pair}
    for pair in pairs:
        union = groups[pair[0]] | groups[pair[1]]
        for device in union:
            groups[device] = union
    return tuple(sorted(tuple(sorted(group)) for group in set(groups.values())))
