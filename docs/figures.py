"""Draws the figures of docs/: python docs/figures.py

Writes docs/figures/NAME-light.svg and NAME-dark.svg, for light and dark pages. What they show is
computed where it can be: the search is one of random scores, the pairs are those that the retrieval
compares, and the sums are of the reads that are drawn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from pkm_jax.memory.product_keys import rank_pairs

FOLDER = Path(__file__).parent / 'figures'
SEEDS = 1, 24      # of the random scores in two figures


class Theme(NamedTuple):
    """Colours of one theme: `first` and `second` are two kinds of things, `*_fill` their areas."""
    ink: str
    muted: str
    line: str
    panel: str
    first: str
    first_fill: str
    second: str
    second_fill: str


THEMES = {
    'light': Theme('#1f2328', '#59636e', '#afb8c1', '#f3f5f7', '#0757ba', '#cfe5ff', '#a94300',
                   '#ffdcc2'),
    'dark': Theme('#e6edf3', '#9aa4af', '#59636e', '#22272e', '#79b8ff', '#173f6b', '#ffa657',
                  '#5c3210')}


class Drawing:
    """An SVG file of one theme; x to the right and y downwards, in pixels."""

    def __init__(self, width: int, height: int, title: str, theme: Theme):
        self.theme, self.parts = theme, [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif">',
            f'<title>{escape(title)}</title>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{theme.muted}"/>'
            '</marker></defs>']

    def box(self, x: float, y: float, width: float, height: float, fill: str = 'none',
            line: str = 'none', round: float = 3, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="5 4"' if dashed else ''
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
                          f'rx="{round:g}" fill="{fill}" stroke="{line}"{dashes}/>')

    def text(self, x: float, y: float, words: str, size: float = 14, color: str = '',
             anchor: str = 'middle', bold: bool = False) -> None:
        """Words whose middle is at the height y."""
        weight = ' font-weight="600"' if bold else ''
        self.parts.append(f'<text x="{x:g}" y="{y + .35 * size:g}" font-size="{size:g}" '
                          f'fill="{color or self.theme.ink}" text-anchor="{anchor}"{weight}>'
                          f'{escape(words)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        path = 'M' + 'L'.join(f'{x:g} {y:g}' for x, y in points)
        self.parts.append(f'<path d="{path}" fill="none" stroke="{self.theme.muted}" '
                          'stroke-width="1.5" marker-end="url(#tip)"/>')

    def labelled(self, x: float, y: float, width: float, height: float, words: str,
                 fill: str = '', line: str = '', size: float = 14) -> None:
        self.box(x, y, width, height, fill or self.theme.panel, line or self.theme.line)
        self.text(x + width / 2, y + height / 2, words, size)

    def done(self) -> str:
        return '\n'.join([*self.parts, '</svg>']) + '\n'


class Search(NamedTuple):
    """The k best of count² slots, by random scores of count sub-keys in each of two codebooks."""
    scores: np.ndarray      # [2, count], the least of them 0
    rows: list[int]         # the k best sub-keys of the first codebook
    columns: list[int]      # … of the second
    slots: list[tuple[int, int]]


def searched(count: int, k: int, seed: int) -> Search:
    scores = np.random.default_rng(seed).normal(size=(2, count))
    scores -= scores.min()
    rows, columns = (list(map(int, np.argsort(-half)[:k])) for half in scores)
    best = np.argsort(-(scores[0][:, None] + scores[1]), axis=None)[:k]
    return Search(scores, rows, columns, [divmod(int(slot), count) for slot in best])


def memory(theme: Theme) -> str:
    """A block of BERT with a memory beside its feed-forward layer, and what the memory does."""
    at = Drawing(860, 330, 'A memory beside a feed-forward layer: two halves of a query search two '
                 'codebooks; the slots where the best sub-keys cross are read.', theme)
    at.labelled(30, 275, 190, 34, 'attention')
    at.arrow((125, 275), (125, 250), (70, 250), (70, 222))
    at.arrow((125, 250), (180, 250), (180, 222))
    at.arrow((125, 250), (125, 111))
    at.labelled(22, 150, 92, 72, 'FFN')
    at.labelled(136, 150, 92, 72, 'memory', theme.first_fill, theme.first)
    at.arrow((68, 150), (68, 98), (112, 98))
    at.arrow((182, 150), (182, 98), (138, 98))
    at.parts.append(f'<circle cx="125" cy="98" r="12" fill="{theme.panel}" stroke="{theme.line}"/>')
    at.text(125, 97, '+', 18)
    at.arrow((125, 86), (125, 64))
    at.labelled(30, 30, 190, 34, 'layer norm')
    at.text(125, 14, 'one block', 13, theme.muted)
    at.parts.append(f'<path d="M236 150L292 30M236 222L292 316" stroke="{theme.first}" '
                    'stroke-dasharray="4 4" fill="none"/>')

    at.text(352, 14, 'query', 13, theme.muted)
    at.labelled(302, 60, 100, 34, 'first half', theme.first_fill, theme.first)
    at.labelled(302, 246, 100, 34, 'second half', theme.second_fill, theme.second)
    at.text(352, 170, 'norm(x·W + b)', 13)
    at.arrow((352, 158), (352, 98))
    at.arrow((352, 182), (352, 242))
    left, top, cell, count = 492, 72, 21, 9
    _, rows, columns, slots = searched(count, 3, seed=SEEDS[0])
    at.arrow((402, 77), (440, 77), (440, 166), (462, 166))
    at.arrow((402, 263), (446, 263), (446, 46), (488, 46))
    at.text(left + count * cell / 2, 14, 'N² slots = pairs of sub-keys', 13, theme.muted)
    for number in range(count):
        at.box(left - 26, top + number * cell + 2, 18, cell - 4,
               theme.first_fill if number in rows else 'none',
               theme.first if number in rows else theme.line, 2)
        at.box(left + number * cell + 2, top - 34, cell - 4, 18,
               theme.second_fill if number in columns else 'none',
               theme.second if number in columns else theme.line, 2)
    for i in range(count):
        for j in range(count):
            chosen = (i, j) in slots
            at.box(left + j * cell + 2, top + i * cell + 2, cell - 4, cell - 4,
                   theme.ink if chosen else theme.panel if i in rows and j in columns else 'none',
                   theme.ink if chosen else theme.line, 2)
    at.text(left + count * cell / 2, 292, 'the K best, found exactly', 13)
    at.arrow((left + count * cell + 8, 166), (712, 166))
    at.text(782, 14, 'read', 13, theme.muted)
    for number, share in enumerate((.46, .33, .21)):
        y = 96 + 56 * number
        at.box(720, y, 124, 26, theme.panel, theme.line)
        at.box(720, y, 124 * share, 26, theme.first_fill, theme.first)
        at.text(782, y + 13, f'{share:g} · value', 13)
    at.text(782, 82, 'softmax', 12, theme.muted)
    at.text(782, 280, 'sum of K rows', 13)
    at.text(782, 298, 'for each of H heads', 13)
    return at.done()


def placement(theme: Theme) -> str:
    """The three places of a memory in a block."""
    at = Drawing(720, 220, 'Without memory, in the place of the feed-forward layer, and beside it',
                 theme)
    for number, (name, inside) in enumerate((
            ('none', ('FFN',)), ('replace', ('PKM',)), ('add', ('FFN', 'PKM')))):
        middle = 120 + 240 * number
        at.text(middle, 14, name, 15, bold=True)
        at.labelled(middle - 70, 38, 140, 30, 'LN(h + …)')
        at.arrow((middle, 200), (middle, 72))
        places = [middle - 62] if len(inside) == 1 else [middle - 62, middle + 62]
        for x, kind in zip(places, inside, strict=True):
            memory_here = kind == 'PKM'
            at.arrow((middle, 188), (x, 188), (x, 152))
            at.labelled(x - 40, 108, 80, 40, kind, theme.first_fill if memory_here else '',
                        theme.first if memory_here else '')
            at.arrow((x, 108), (x, 88), (middle - 4 if x < middle else middle + 4, 88))
        at.text(middle + 10, 204, 'h', 14, theme.muted, 'start')
    return at.done()


def product_keys(theme: Theme) -> str:
    """Scores of the sub-keys of two codebooks, and of the slots where they cross."""
    count, k, cell, left, top = 12, 4, 26, 110, 120
    at = Drawing(720, 450, f'{2 * count} scores order {count * count} slots', theme)
    scores, rows, columns, slots = searched(count, k, seed=SEEDS[1])
    for number in range(count):
        length = 16 * scores[0, number]
        at.box(left - 8 - length, top + cell * number + 4, length, cell - 8,
               theme.first if number in rows else theme.line, round=1)
        length = 16 * scores[1, number]
        at.box(left + cell * number + 4, top - 8 - length, cell - 8, length,
               theme.second if number in columns else theme.line, round=1)
    for i in range(count):
        for j in range(count):
            chosen = (i, j) in slots
            fill = (theme.ink if chosen else theme.panel if i in rows and j in columns else 'none')
            at.box(left + cell * j + 2, top + cell * i + 2, cell - 4, cell - 4, fill,
                   theme.ink if chosen else theme.line, 2)
    at.text(left + cell * count / 2, 16, 's₂ = C₂·q₂, scores of the second codebook', 14,
            theme.second)
    at.text(8, 92, 's₁ = C₁·q₁', 14, theme.first, 'start')
    x = left + cell * count + 26
    for y, fill, words in ((150, theme.ink, f'the {k} best slots, by s₁[i] + s₂[j]'),
                           (182, theme.panel, f'{k * k} slots where the {k} best'),
                           (250, 'none', 'all others: never scored')):
        at.box(x, y - 9, 18, 18, fill, theme.ink if fill == theme.ink else theme.line, 2)
        at.text(x + 28, y, words, 14, anchor='start')
    at.text(x + 28, 202, 'sub-keys of both halves cross', 14, anchor='start')
    at.text(x + 28, 222, '(they always hold the best)', 14, theme.muted, 'start')
    return at.done()


def pairs(theme: Theme) -> str:
    """The pairs of ranks that can hold one of the 32 best sums."""
    k, cell, left, top = 32, 12, 60, 40
    at = Drawing(720, 450, 'Pairs of ranks (i, j) with i times j at most 32', theme)
    needed = {(int(i), int(j)) for i, j in zip(*rank_pairs(k))}
    for kept, fill in ((True, theme.first), (False, theme.panel)):
        squares = (f'M{left + cell * j + 1} {top + cell * i + 1}h{cell - 2}v{cell - 2}h{2 - cell}z'
                   for i in range(k) for j in range(k) if ((i, j) in needed) == kept)
        at.parts.append(f'<path d="{"".join(squares)}" fill="{fill}"/>')
    at.text(left + cell * k / 2, 12, 'rank j in the second half', 14, theme.second)
    at.parts.append(f'<g transform="translate(16 {top + cell * k / 2:g}) rotate(-90)">')
    at.text(0, 0, 'rank i in the first half', 14, theme.first)
    at.parts.append('</g>')
    for rank in (1, 8, 16, 32):
        at.text(left + cell * (rank - .5), 30, str(rank), 12, theme.muted)
        at.text(left - 8, top + cell * (rank - .5), str(rank), 12, theme.muted, 'end')
    x = left + cell * k + 30
    at.box(x, 120, 14, 14, theme.first, round=1)
    at.text(x + 24, 127, f'i·j ≤ {k}: {len(needed)} pairs', 15, anchor='start', bold=True)
    at.box(x, 160, 14, 14, theme.panel, round=1)
    at.text(x + 24, 167, f'i·j > {k}: {k * k - len(needed)} pairs, each', 15, anchor='start')
    at.text(x + 24, 189, f'with {k} that are no worse', 15, anchor='start')
    at.text(x, 240, 'The sum at ranks (i, j) is no', 14, theme.muted, 'start')
    at.text(x, 260, 'better than the i·j sums to its', 14, theme.muted, 'start')
    at.text(x, 280, 'left and above it.', 14, theme.muted, 'start')
    return at.done()


def streaming(theme: Theme) -> str:
    """The gradient of the rows that were read, as sums over reads sorted by slot."""
    slots = [5, 2, 7, 2, 9, 5, 2, 7, 5, 2, 9, 2]     # of twelve reads in the order of the tokens
    order = sorted(range(len(slots)), key=lambda read: slots[read])     # stable
    size, left, chunk = 44, 150, 4
    at = Drawing(720, 380, 'Reads are sorted by slot, and each slot\'s are added in that order',
                 theme)

    def cells(y, reads):
        for place, read in enumerate(reads):
            x = left + size * place
            shade = theme.second_fill if slots[read] in (2, 7) else theme.first_fill
            at.box(x + 2, y, size - 4, 34, shade, theme.line)
            at.text(x + size / 2, y + 11, f't{read // 3}', 12, theme.muted)
            at.text(x + size / 2, y + 25, str(slots[read]), 13)

    at.text(left - 14, 33, 'reads: token', 13, anchor='end')
    at.text(left - 14, 51, 'and slot', 13, anchor='end')
    cells(24, range(len(slots)))
    at.text(left - 14, 106, 'one stable sort', 13, anchor='end')
    at.arrow((left + 6 * size, 68), (left + 6 * size, 140))
    at.text(left + 6 * size + 12, 104, 'by slot', 13, theme.muted, 'start')
    at.text(left - 14, 167, 'in chunks', 13, anchor='end')
    cells(150, order)
    for start in range(0, len(slots), chunk):
        at.box(left + size * start, 144, size * chunk, 46, line=theme.muted, dashed=True)
    at.text(left - 14, 246, 'sums w·g in float32', 13, anchor='end')
    sums: dict[int, list[int]] = {}
    for place, read in enumerate(order):
        sums.setdefault(slots[read], []).append(place)
    for slot, places in sums.items():
        first, last = left + size * places[0] + 4, left + size * (places[-1] + 1) - 4
        middle = (first + last) / 2
        at.parts.append(f'<path d="M{first:g} 200v8H{last:g}v-8" fill="none" '
                        f'stroke="{theme.muted}"/>')
        at.arrow((middle, 208), (middle, 228))
        shade = theme.second_fill if slot in (2, 7) else theme.first_fill
        at.labelled(middle - 34, 232, 68, 28, f'Σ {len(places)} reads', shade, size=12)
        at.arrow((middle, 260), (middle, 296))
        at.labelled(middle - 34, 300, 68, 28, f'row {slot}', shade)
    at.text(left - 14, 314, 'gradient rows', 13, anchor='end')
    at.text(left + 6 * size, 360, 'No array of tokens × reads × width exists. The order never '
            'changes: the same bits each time.', 13, theme.muted)
    return at.done()


def sharded(theme: Theme) -> str:
    """How a table that four devices share is read by the tokens of all of them."""
    at = Drawing(760, 400, 'A table in 2 × 2 parts: slots go out, partial sums come back', theme)
    steps = ((30, '1  each device finds the', 'slots of its own tokens'),
             (275, '2  all get all slots, and read', 'what their part holds'),
             (520, '3  partial sums go back', 'to the owners of the tokens'))
    for x, *lines in steps:
        for number, words in enumerate(lines):
            at.text(x + (22 if number else 0), 16 + 19 * number, words, 14, anchor='start')
    at.arrow((226, 210), (262, 210))
    at.arrow((471, 210), (507, 210))
    shades = (theme.first_fill, theme.second_fill)
    for step, (x, *_) in enumerate(steps):
        for device in range(4):
            row, column = divmod(device, 2)
            left, top = x + 96 * column, 60 + 160 * row
            at.box(left, top, 88, 148, line=theme.line)
            at.text(left + 44, top + 14, f'device {device}', 12, theme.muted)
            for part in range(4):       # of the tokens, or of the slots and columns
                own = part == device
                y = top + 84 + 14 * part
                if step == 0:
                    at.box(left + 12, y, 64, 11, theme.ink if own else 'none', theme.line, 1)
                elif step == 1:
                    at.box(left + 12 + 32 * column, y, 32, 11, shades[row], theme.line, 1)
                    at.box(left + 12, y, 64, 11, 'none', theme.line, 1)
                elif own:
                    at.box(left + 12, y, 64, 11, theme.ink, theme.ink, 1)
                else:
                    at.box(left + 12, y, 64, 11, 'none', theme.line, 1)
            for number, shade in enumerate(shades):     # the table, and this device's part
                for half in range(2):
                    mine = number == row and half == column
                    at.box(left + 12 + 32 * half, top + 26 + 24 * number, 32, 24,
                           shade if mine else 'none', theme.line, 1)
    at.text(30, 390, 'above: the part of the table [S, V] that a device holds;  below: tokens, '
            'one bar for each device’s', 13, theme.muted, 'start')
    return at.done()


FIGURES: dict[str, Callable[[Theme], str]] = {
    draw.__name__: draw for draw in (memory, placement, product_keys, pairs, streaming, sharded)}


def drawn() -> dict[str, str]:
    """{file name: its content} of all figures in both themes."""
    return {f'{name}-{theme}.svg': draw(colors)
            for name, draw in FIGURES.items() for theme, colors in THEMES.items()}


if __name__ == '__main__':
    FOLDER.mkdir(exist_ok=True)
    for name, content in drawn().items():
        (FOLDER / name).write_text(content, encoding='utf-8')
