"""Blocks of any height and width up to 64, on a grid that may begin anywhere, and whole kernels.

The mask of a block matrix changes from one row to the next at the edges of blocks only. So the
number of changes, added up by the row's number modulo a height, has one peak: where the grid
begins. Columns likewise. Only heights and widths with such a peak are looked at further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np

from ..findings import Finding
from .chance import Null
from .counts import fold
from .parts import CHANCE, NEAR, TELLING, Parts, histogram, log_chance, log_chance_within, split
from .zeros import Zeros

SIDES = (1, 2, 4, 8, 16, 32, 64)
# Changes at the second most frequent place, over those at the most frequent one.
_PEAK = 0.5
# Every grid that a weight might be held against; its chance counts that often.
_TRIES = sum(SIDES) ** 2
# Larger weights are looked at in a strip of so many rows first, with less asked of them.
_STRIP_ROWS, _STRIP_CELLS = 512, 1 << 22
_LOOSE = 0.8


def block_findings(zeros: Zeros) -> list[tuple[int, Finding]]:
    """Return the largest blocks that nearly hold, and the largest that hold exactly, if any do.

    Each with the cells of a block.
    """
    found: list[tuple[int, Finding]] = []
    for shape, offset in _candidates(zeros):
        if not _worth_it(zeros.mask, shape, offset):
            continue
        finding = _judge(zeros, shape, offset)
        cells = shape[0] * shape[1]
        if finding and (not found or (finding.exact and cells >= TELLING)):
            found.append((cells, finding))
            if finding.exact:
                break
    return found


def kernel_findings(zeros: Zeros) -> list[tuple[int, Finding]]:
    """Return what whole kernels of a convolution explain."""
    counts = zeros.counts
    if counts.kernels is None:
        return []
    parts = Parts({counts.taps: counts.kernels})
    cut, chance = split(parts), log_chance(parts)
    if not cut.stands() or chance > math.log(CHANCE):
        return []
    log10 = chance / math.log(10)
    return [(counts.taps, Finding("kernel", cut.violations, cut.explained, cut.fill, log10))]


def _judge(zeros: Zeros, shape: tuple[int, int], offset: tuple[int, int]) -> Finding | None:
    parts = block_parts(zeros.mask, shape, offset)
    cut = split(parts)
    # Single cells at the edge would explain a full row there.
    if not cut.stands() or not split(parts.uncut).stands():
        return None
    chances = [log_chance(parts)]
    if shape[1] == 1:
        chances.append(log_chance_within(parts, zeros.counts.columns, zeros.counts.shape[0]))
    if shape[0] == 1:
        chances.append(log_chance_within(parts, zeros.counts.rows, zeros.counts.shape[1]))
    chance = max(chances) + math.log(_TRIES)
    if chance > math.log(CHANCE):
        return None
    form, log10 = f"block:{shape[0]}x{shape[1]}", chance / math.log(10)
    return Finding(form, cut.violations, cut.explained, cut.fill, log10, offset)


def block_parts(mask: np.ndarray, shape: tuple[int, int], offset: tuple[int, int]) -> Parts:
    """Count the nonzeros of every block of a grid; those at the edges may be cut."""
    histograms: dict[int, np.ndarray] = {}
    for rows, height in _segments(mask.shape[0], shape[0], offset[0]):
        folded = fold(mask[rows], height, 0, np.uint16 if height > 255 else None)
        for columns, width in _segments(mask.shape[1], shape[1], offset[1]):
            cells = height * width
            counts = fold(folded[:, columns], width, 1, np.uint16 if cells > 255 else None)
            found = histogram(counts, cells)
            histograms[cells] = histograms.get(cells, 0) + found
    return Parts(histograms)


def _segments(extent: int, side: int, offset: int) -> Iterator[tuple[slice, int]]:
    """Cut an extent into what comes before the first whole part, whole parts, and the rest."""
    end = offset + (extent - offset) // side * side
    for start, stop, each in (
        (0, offset, offset),
        (offset, end, side),
        (end, extent, extent - end),
    ):
        if start < stop:
            yield slice(start, stop), each


def _candidates(zeros: Zeros) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """List the blocks and grids that changes hint at, the largest blocks first."""
    rows, columns = (
        {side: offset for side in SIDES if (offset := _grid(changes, side)) is not None}
        for changes in (zeros.counts.row_changes, zeros.counts.column_changes)
    )
    shapes = [shape for shape in product(rows, columns) if shape != (1, 1)]
    shapes.sort(key=lambda shape: (-shape[0] * shape[1], abs(math.log(shape[0] / shape[1]))))
    return [((height, width), (rows[height], columns[width])) for height, width in shapes]


def _grid(changes: np.ndarray, side: int) -> int | None:
    """Return where a grid of this side begins, if changes come at one place of every `side`."""
    extent = len(changes)
    if side == 1 or extent == side:
        return 0
    if extent < side:
        return None
    padded = np.zeros(-(-extent // side) * side)
    padded[:extent] = changes
    edges = np.bincount(np.arange(1, extent) % side, minlength=side)
    rates = padded.reshape(-1, side).sum(axis=0) / edges
    first, second = np.argsort(-rates, kind="stable")[:2]
    return int(first) if rates[second] <= _PEAK * rates[first] else None


def _worth_it(mask: np.ndarray, shape: tuple[int, int], offset: tuple[int, int]) -> bool:
    """Whether a strip of a large matrix does not speak against a grid."""
    rows = mask.shape[0]
    if mask.size <= _STRIP_CELLS or rows <= 2 * _STRIP_ROWS:
        return True
    # From a multiple of every side on, or the grid would begin elsewhere.
    start = (rows - _STRIP_ROWS) // 2 // SIDES[-1] * SIDES[-1]
    cut = split(block_parts(mask[start : start + _STRIP_ROWS], shape, offset))
    return not _says_something(cut.null) or cut.stands(3 * NEAR, _LOOSE)


def _says_something(null: Null) -> bool:
    return 0 < null.nnz < null.size
