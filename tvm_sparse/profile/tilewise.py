"""Tile-wise sparsity, with and without single elements that were restored.

Whole rows are dropped; the others, in their order, make tiles of G, and each tile keeps columns of
its own, as a whole. "TEW" restores a few of the elements that this dropped, wherever they are.

References
----------
C. Guo et al., "Accelerating Sparse DNN Models without Hardware-Support via Tile-Wise Sparsity",
SC 2020, sections IV-A and IV-B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..findings import Finding
from .blocks import SIDES, block_parts
from .chance import Null, log_at_most, log_choose
from .counts import fold
from .data import TILE_HEIGHTS
from .parts import CHANCE, NEAR, Split, log_chance, log_chance_in_lines, split
from .zeros import Zeros

# Nonzeros that may have been restored; the paper restores up to 15 % of the weights.
RESTORED = 0.2
# Smaller weights are looked at without a hint.
_SMALL = 1 << 18
_HINT_HELD, _HINT_FILL = 0.75, 0.85
# Higher tiles may restore so many times the elements of lower ones.
_AS_GOOD = 1.25
# Rows that are kept have so many times the nonzeros of those that are dropped.
_GAP = 2.0


def tile_findings(zeros: Zeros) -> list[tuple[int, Finding]]:
    """Return the highest tiles that explain the zeros, with the cells of a tile's column."""
    for limit in _row_limits(zeros):
        kept = zeros.counts.rows > limit
        rows = zeros.mask if kept.all() else zeros.mask[kept]
        found = [
            (height, finding)
            for height in reversed(TILE_HEIGHTS)
            if len(rows) >= height and (finding := _judge(zeros, rows, height))
        ]
        if found:
            # Tiles twice as high are nearly there, too, where neighbours share most columns.
            least = min(finding.violations for _, finding in found)
            return [next(f for f in found if f[1].violations <= _AS_GOOD * least)]
    return []


def _row_limits(zeros: Zeros) -> Iterator[int]:
    """Yield limits up to which a row's nonzeros may make it a dropped one, as counts hint."""
    counts = zeros.counts
    if counts.size <= _SMALL or any(
        fit.full_nnz >= _HINT_HELD * counts.nnz
        and fit.full_nnz >= _HINT_FILL * fit.height * fit.full_columns
        for fit in counts.tiles
    ):
        yield 0
    ordered = np.sort(counts.rows) + 4.0
    ratios = ordered[1:] / ordered[:-1]
    if len(ratios) and ratios.max() >= _GAP:
        limit = int(ordered[ratios.argmax()] - 4)
        if limit:
            yield limit


def _judge(zeros: Zeros, rows: np.ndarray, height: int) -> Finding | None:
    """Claim tiles of `height` on the rows that are left, if they stand."""
    counts = zeros.counts
    dropped = counts.shape[0] - len(rows)
    parts = block_parts(rows, (height, 1), (0, 0))
    inner = split(parts)
    strays = counts.nnz - inner.null.nnz
    whole = Split(inner.kept_cells, inner.violations + strays, Null(counts.size, counts.nnz))
    if not whole.stands(RESTORED) or not inner.stands(RESTORED):
        return None
    if not dropped and height in SIDES and whole.violations <= NEAR * counts.nnz:
        # Blocks of one column are the simpler word for it.
        return None
    chance = max(log_chance(parts), log_chance_in_lines(_column_counts(rows, height)))
    chance += _log_choices(zeros, dropped, strays) + math.log(len(TILE_HEIGHTS))
    if chance > math.log(CHANCE):
        return None
    form = f"tew:{height}" if whole.violations else f"tile-wise:{height}"
    log10 = chance / math.log(10)
    return Finding(form, whole.violations, whole.explained, whole.fill, log10)


def _column_counts(rows: np.ndarray, height: int) -> dict[int, np.ndarray]:
    """Count the nonzeros of each tile's columns, [tiles, columns]; the last tile may be lower."""
    whole, rest = divmod(len(rows), height)
    kind = np.uint16 if height > 255 else None
    counts = {height: fold(rows[: whole * height], height, 0, kind)}
    if rest:
        counts[rest] = fold(rows[whole * height :], rest, 0, kind)
    return counts


def _log_choices(zeros: Zeros, dropped: int, strays: int) -> float:
    """Bound how many sets of rows might have been dropped, as those few that held so little.

    Given how many nonzeros the others hold, a random matrix has them at random places there. So
    the chance of finding some rows to drop, with at most `strays` nonzeros, and tiles in the others
    is at most: that of the tiles, times that of so few nonzeros in these rows, times the number of
    sets of rows. The two numbers were found by looking, too.
    """
    rows = zeros.counts.shape[0]
    so_few = log_at_most(strays, zeros.counts.nnz * dropped / rows)
    numbers = math.log(rows + 1) + math.log(zeros.counts.nnz + 1)
    return max(0.0, log_choose(rows, dropped) + so_few) + numbers
