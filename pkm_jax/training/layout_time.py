"""How long a step's work on value tables takes, by how they are split: arithmetic, at peak rates.

Only what depends on the layout counts: bytes sent over links (`memory.bytes_sent`), then bytes that
go between a device's memory and its chip, with nothing hidden behind anything. The backbone, its
optimizer and the search for slots take as long in every layout.
"""

import math
from collections import Counter
from typing import NamedTuple

import jax

from pkm_jax.accelerators import LANES, Chip, chip_of
from pkm_jax.memory.bytes_sent import Read, bytes_sent, mean_squares_sent
from pkm_jax.memory.embedding_bag import even_passes
from pkm_jax.memory.replica_exchange import replica_exchange
from pkm_jax.mesh import Shards

# Of devices of which nothing is published bytes alone are compared: one that is sent counts as
# eight that are read (H100 7, H200 11, A100 7, TPUs 4 to 5), over a network as 64. CPU devices send
# through the memory that they share.
UNKNOWN = Chip(0, 0., bandwidth=8., links=1., dimensions=0, network=1 / 8, kinds=())
CPU = UNKNOWN._replace(bandwidth=1.)
SLOW_NETWORK = 30   # links over the network where that is not published, at least (docs/design.md)
READ = 12           # bytes of a read in a sort by slots: its slot, number and weight
RADIX_PASSES = 8    # over what a GPU sorts: four turns that read and write all
ON_CHIP = 2 ** 24   # bytes that a TPU sorts at a time, between passes of a bitonic sort
COLLECTIVE = 10e-6  # seconds that starting one takes, however little it sends


class Rates(NamedTuple):
    """How fast the devices of a run are."""
    chip: Chip
    joined: int = 0         # devices that links join, of a slice or a host; 0: all
    plain: bool = False     # no kernels: a block of tokens passes over as many reads as the most

    @property
    def known(self) -> bool:
        return self.chip.flops > 0

    @property
    def known_gpus(self) -> bool:
        """Whether they are NVIDIA GPUs of which numbers are published, and kernels are used."""
        return self.known and self.may_be_gpus

    @property
    def may_be_gpus(self) -> bool:
        """Whether kernels are used, on other devices than TPUs of which numbers are published."""
        return not self.plain and not self.chip.dimensions

    def link(self, shards: Shards, axes: tuple[str, ...]) -> float:
        """Bytes a second that a device can send along some axes of the mesh, at best.

        Devices that differ in rows and columns alone are neighbours. On a torus, few devices lie
        along one of its dimensions.
        """
        chip, joined = self.chip, self.joined or math.prod(shards)
        if self.span(shards, axes) > joined:
            return chip.network or chip.links / SLOW_NETWORK
        if not chip.dimensions:
            return chip.links
        members = math.prod(getattr(shards, axis) for axis in axes)
        side = max(2, joined ** (1 / chip.dimensions))
        crossed = math.ceil(math.log(members) / math.log(side) - 1e-9)
        return chip.links * min(crossed, chip.dimensions) / chip.dimensions

    def crosses(self, shards: Shards) -> bool:
        """Whether a copy of a table would be in several slices of TPUs: `make_mesh` makes none."""
        return bool(self.chip.dimensions and self.joined) and bool(
            self.joined % (shards.rows * shards.columns))

    def said(self, seconds: float) -> str:
        """An estimate in words."""
        return (f'{seconds * 1e3:,.2f} ms' if self.known else
                f'{seconds / 1e6:,.1f} MB sent or as good as sent')

    @staticmethod
    def span(shards: Shards, axes: tuple[str, ...]) -> int:
        """How many neighbours a group along these axes lies within."""
        outermost = min(Shards._fields.index(axis) for axis in axes
                        if getattr(shards, axis) > 1)
        return math.prod(shards[outermost:])


NOT_KNOWN = Rates(UNKNOWN)


class Work(NamedTuple):
    """What a step does with value tables."""
    read: Read
    memories: int           # reads of this size in a micro-batch
    tables: int             # different ones that they read
    steps: int              # micro-batches
    itemsize: int           # bytes of a value in the table
    state: float            # bytes of optimizer state for each
    sparse: bool
    by_row: bool            # the optimizer needs the mean square of a row


def rates_here() -> Rates:
    """Those of this machine's devices, or of the cluster's; the same in all processes."""
    device = jax.devices()[0]
    if device.platform == 'cpu':
        return Rates(CPU, plain=True)
    # Of GPUs the slice is the host that they are in.
    places = Counter(getattr(other, 'slice_index', other.process_index) for other in jax.devices())
    return Rates(chip_of(device.device_kind) or UNKNOWN, min(places.values()))


def seconds_by_layout(shards: Shards, work: Work, rates: Rates) -> float:
    """Seconds of a step's work on value tables in a layout; of unknown devices bytes, sent ones
    and an eighth of those between memory and chip."""
    sent = bytes_sent(shards, work.read, work.sparse)
    starts = COLLECTIVE if rates.known else 0
    links = work.memories * work.steps * sum(
        one.bytes / rates.link(shards, one.axes) + starts for one in sent)
    if work.by_row and work.sparse and shards.columns > 1:
        squares = mean_squares_sent(shards, _rows(shards, work.read, work.steps))
        links += work.tables * squares.bytes / rates.link(shards, squares.axes)
    moved = (work.memories * work.steps * _moved_by_read(shards, work, rates)
             + work.tables * _moved_by_update(shards, work, rates))
    return links + moved / rates.chip.bandwidth


def _rows(shards, read, steps=1):
    """Rows of a shard that some micro-batches can touch."""
    return min(read.slots // shards.rows, steps * read.tokens * read.reads)


def _moved_by_read(shards, work, rates):
    """Bytes of a memory's read, forward and backward, in a micro-batch; reads spread evenly."""
    read, part = work.read, work.read.width // shards.columns
    group = read.tokens // shards.data
    exchange = replica_exchange(shards, *read).what
    seen = read.tokens if work.sparse and exchange == 'tokens' else group   # backward
    own, own_first = read.reads / shards.rows, 0.
    if rates.plain and shards.rows > 1:
        own = even_passes(group, read.reads, shards.rows)
        # The reads of each token are sorted forward, backward and back.
        own_first = 6 * group * read.reads * (READ + 4) * math.log2(read.reads)
    # Rows forward, rows again for the gradients of the weights, and output gradients.
    by_row = (2 * group + seen) * own * part * read.itemsize
    # Slots and weights are written as gathered and read, forward and backward; then sorted.
    packed = rates.chip.dimensions and work.sparse      # own reads alone
    sort = seen * read.reads * READ // (shards.rows if packed else 1)
    lists = 2 * (group + seen) * read.reads * (4 + read.weight_itemsize) + (
        sort * _passes_of_sort(sort, rates))
    partial = 4 * group * part * 4 if shards.rows > 1 else 0
    merged = (2 * shards.data * _rows(shards, read._replace(tokens=group)) * part * 4
              if work.sparse and exchange == 'rows' else 0)
    return by_row + lists + own_first + partial + merged


def _passes_of_sort(size, rates):
    """Passes over so many bytes that a device sorts as one list."""
    if not rates.chip.dimensions:
        return RADIX_PASSES
    return 2 * passes_of_bitonic_sort(size, ON_CHIP)    # which read and write


def passes_of_bitonic_sort(size: int, on_chip: int) -> int:
    """How often a list of so many bytes goes through HBM and back, of which so many fit a chip.

    Levels that merge what is longer have as many steps as there are doublings, and one more within
    parts.
    """
    doublings = math.ceil(math.log2(max(size / on_chip, 1)))
    return 1 + doublings * (doublings + 3) // 2


def _moved_by_update(shards, work, rates):
    """Bytes of a table's gradients, its update, and what is rounded of it for the reads."""
    part, steps = work.read.width // shards.columns, work.steps
    stored = 2 * (work.itemsize + work.state)       # read and written
    if work.sparse:
        # Gradient rows written, read for their norm and for the update, whose own rows are written
        # and read but by a kernel; those of several micro-batches are read and added up.
        rows = _rows(shards, work.read, steps)
        all_rows = rows == work.read.slots // shards.rows
        kernel = not rates.plain and (      # few rows: `optimizers.tpu_few_rows.unsupported`
            not rates.chip.dimensions or all_rows or part % LANES == 0)
        passes = 12 if kernel else 20
        summed = steps * _rows(shards, work.read) * 12 if steps > 1 else 0
        return part * (rows * (passes + stored) + summed)
    # In each micro-batch values are read and rounded, gradients written, read, widened and added.
    rounded = 4 + 2 * work.read.itemsize
    summed = (12 if shards.data > 1 else 4) + (8 if steps > 1 else 0)
    return work.read.slots // shards.rows * part * (steps * (rounded + summed) + 8 + stored)
