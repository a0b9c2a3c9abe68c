"""What is counted of every weight, in one pass over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..formats.tensor_tiles import listed_a_column
from .data import BLOCK_SHAPES, NM_PATTERNS, TILE_HEIGHTS, TILE_RUN, BlockFit, NMFit, TileFit

# Columns of a tile that are arranged as two of four, to see how often they are listed: so many
# neighbours here and there.
_SAMPLED, _SAMPLED_TOGETHER = 512, 16
# Cells looked at in one go: the boolean copies of it stay in a core's cache. Chunks of rows begin
# where blocks of every shape do.
_CHUNK_CELLS = 1 << 20
_CHUNK_ROWS = 64


@dataclass(frozen=True)
class Counts:
    """What one pass over a weight counts.

    Attributes
    ----------
    rows, columns : numpy.ndarray
        Nonzeros of each.
    row_changes, column_changes : numpy.ndarray
        Cells of a row that are zero where those of the row before are not, or the other way round;
        0 for the first row. Columns likewise.
    kernels : numpy.ndarray or None
        How many kernels of a convolution hold 0, 1, ... `taps` nonzeros.
    """

    shape: tuple[int, int]
    taps: int
    nnz: int
    rows: np.ndarray
    columns: np.ndarray
    row_changes: np.ndarray
    column_changes: np.ndarray
    kernels: np.ndarray | None
    blocks: tuple[BlockFit, ...]
    nm: tuple[NMFit, ...]
    tiles: tuple[TileFit, ...]

    @property
    def size(self) -> int:
        """Elements, zero or not."""
        return self.shape[0] * self.shape[1]

    @property
    def channels(self) -> np.ndarray:
        """Nonzeros of each input channel."""
        found: np.ndarray = self.columns.reshape(-1, self.taps).sum(axis=1)
        return found


def count(w: np.ndarray, taps: int) -> Counts:
    """Count what lies where in a weight [rows, columns]."""
    tally = _Tally((w.shape[0], w.shape[1]), taps, w.dtype)
    for chunk in row_chunks(w):
        tally.add(chunk)
    return tally.result()


def row_chunks(w: np.ndarray) -> Iterator[np.ndarray]:
    """Yield uint8 masks of whole rows; all but the last hold a multiple of `_CHUNK_ROWS`."""
    rows, columns = w.shape
    step = max(_CHUNK_ROWS, _CHUNK_CELLS // max(columns, 1) // _CHUNK_ROWS * _CHUNK_ROWS)
    for start in range(0, rows, step):
        yield (w[start : start + step] != 0).view(np.uint8)


def fold(counts: np.ndarray, factor: int, axis: int, dtype: type | None = None) -> np.ndarray:
    """Add up every `factor` neighbours along `axis`; the last sum may be of fewer."""
    cut: list[slice] = [slice(None)] * counts.ndim
    cut[axis] = slice(0, None, factor)
    total: np.ndarray = counts[tuple(cut)].astype(dtype or counts.dtype)
    for offset in range(1, factor):
        cut[axis] = slice(offset, None, factor)
        part = counts[tuple(cut)]
        head: list[slice] = [slice(None)] * counts.ndim
        head[axis] = slice(0, part.shape[axis])
        total[tuple(head)] += part
    return total


def _block_counts(mask: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Nonzeros of every block of `mask` [rows, columns], for each of `BLOCK_SHAPES`."""
    found = {(4, 1): fold(mask, 4, 0), (1, 4): fold(mask, 4, 1)}
    found[8, 1] = fold(found[4, 1], 2, 0)
    found[16, 1] = fold(found[8, 1], 2, 0)
    found[1, 8] = fold(found[1, 4], 2, 1)
    found[1, 16] = fold(found[1, 8], 2, 1)
    found[4, 4] = fold(found[1, 4], 4, 0)
    for side in (8, 16, 32, 64):
        half = found[side // 2, side // 2]
        # As many cells as eight bits cannot count.
        found[side, side] = fold(fold(half, 2, 0, np.uint16 if side >= 16 else None), 2, 1)
    return found


class _Changes:
    """How often neighbouring rows, and neighbouring columns, differ in what is zero."""

    def __init__(self, columns: int) -> None:
        self.rows: list[np.ndarray] = []
        self.columns = np.zeros(columns, np.int64)
        self.last: np.ndarray | None = None

    def add(self, mask: np.ndarray) -> None:
        """Compare a chunk with itself and with the last row before it; eight cells at a time."""
        packed = np.packbits(mask, axis=1)
        before = packed[:1] if self.last is None else self.last
        above = np.concatenate([before, packed[:-1]])
        self.rows.append(np.bitwise_count(packed ^ above).sum(axis=1, dtype=np.int64))
        self.last = packed[-1:]
        stacked = np.zeros((-(-len(mask) // 8), mask.shape[1]), np.uint8)
        for bit in range(min(8, len(mask))):
            part = mask[bit::8]
            stacked[: len(part)] |= part << np.uint8(bit)
        changed = np.bitwise_count(stacked[:, 1:] ^ stacked[:, :-1])
        self.columns[1:] += changed.sum(axis=0, dtype=np.int64)


class _TileTally:
    """Counts of tiles, whose rows are those with a nonzero."""

    def __init__(self, columns: int, dtype: np.dtype) -> None:
        self.dtype = np.float16 if dtype.itemsize == 2 else np.float32
        self.left: np.ndarray = np.zeros((0, columns), np.uint8)
        self.counts = {height: [0] * 6 for height in TILE_HEIGHTS}
        self.listed: dict[int, list[tuple[float, float]]] = {}

    def add(self, mask: np.ndarray) -> None:
        """Count the tiles that are complete; the other rows wait for the next chunk."""
        filled = mask.any(axis=1)
        filled = mask if filled.all() else mask[filled]
        rows = np.concatenate([self.left, filled]) if len(self.left) else filled
        whole = len(rows) // TILE_HEIGHTS[-1] * TILE_HEIGHTS[-1]
        self._count(rows[:whole])
        self.left = rows[whole:]

    def _count(self, rows: np.ndarray) -> None:
        if not rows.size:
            return
        held = fold(fold(rows, 4, 0), 4, 0)
        for height in TILE_HEIGHTS:
            if height > TILE_HEIGHTS[0]:
                # As many rows as eight bits cannot count.
                held = fold(held, 2, 0, np.uint16 if height > 128 else None)
            full = held > height // 2
            found = (
                len(held),
                np.count_nonzero(held),
                _in_runs(held > 0),
                np.count_nonzero(full),
                _in_runs(full),
                held[full].sum(dtype=np.int64),
            )
            self.counts[height] = [
                a + int(b) for a, b in zip(self.counts[height], found, strict=True)
            ]
            if height not in self.listed:
                self.listed[height] = self._sample(_sampled(rows[:height]))

    def _sample(self, tile: np.ndarray) -> list[tuple[float, float]]:
        """Tell how often columns are listed, alone and beside a dense part."""
        tile = tile.astype(self.dtype)
        in_runs = tile[:, : tile.shape[1] // TILE_RUN * TILE_RUN]
        has_full = bool((np.count_nonzero(tile, axis=0) > len(tile) // 2).any())
        found = [
            (listed_a_column(tile, 1, beside), listed_a_column(in_runs, TILE_RUN, beside))
            for beside in (False, True)[: 1 + has_full]
        ]
        return [found[0], found[-1]]

    def fits(self) -> tuple[TileFit, ...]:
        """Count the rows that are left, too, and return what was found."""
        self._count(self.left)
        found = []
        for height in TILE_HEIGHTS:
            alone, rest = self.listed.get(height, [(1.0, 1.0)] * 2)
            tiles, columns, in_runs, full, full_in_runs, full_nnz = self.counts[height]
            found.append(
                TileFit(height, tiles, columns, in_runs, full, full_in_runs, full_nnz, alone, rest)
            )
        return tuple(found)


def _sampled(tile: np.ndarray) -> np.ndarray:
    """Choose pieces of neighbouring columns, evenly among those that have a nonzero."""
    starts = np.arange(0, tile.shape[1], _SAMPLED_TOGETHER)
    filled = starts[np.add.reduceat(tile.any(axis=0), starts, dtype=np.int64) > 0]
    count = min(len(filled), _SAMPLED // _SAMPLED_TOGETHER)
    chosen = filled[np.linspace(0, len(filled) - 1, count, dtype=np.int64)]
    columns = (chosen[:, None] + np.arange(_SAMPLED_TOGETHER)).reshape(-1)
    return tile[:, columns[columns < tile.shape[1]]]


def _in_runs(chosen: np.ndarray) -> int:
    """Count the columns of the runs in which one is chosen."""
    return TILE_RUN * int(np.count_nonzero(fold(chosen.view(np.uint8), TILE_RUN, 1)))


class _Tally:
    """Counts gathered over chunks of rows; those of a chunk start at a multiple of 64."""

    def __init__(self, shape: tuple[int, int], taps: int, dtype: np.dtype) -> None:
        self.shape = shape
        self.taps = taps
        self.rows: list[np.ndarray] = []
        self.columns = np.zeros(shape[1], np.int64)
        self.occupied = dict.fromkeys(BLOCK_SHAPES, 0)
        self.covered = dict.fromkeys(BLOCK_SHAPES, 0)
        self.kernels = np.zeros(taps + 1, np.int64)
        self.changes = _Changes(shape[1])
        self.tiles = _TileTally(shape[1], dtype)
        alongs = ("columns",) if taps == 1 else ("columns", "channels")
        self.violations = {(n, m, along): 0 for along in alongs for n, m in NM_PATTERNS}

    def add(self, mask: np.ndarray) -> None:
        """Count `mask`, the uint8 nonzero mask [rows of this chunk, columns]."""
        blocks = _block_counts(mask)
        self.tiles.add(mask)
        self.changes.add(mask)
        self.rows.append(blocks[1, 16].sum(axis=1, dtype=np.int64))
        self.columns += blocks[16, 1].sum(axis=0, dtype=np.int64)
        for block_shape, counts in blocks.items():
            self._add_blocks(block_shape, counts, mask.shape[0])
        self._add_groups("columns", {4: blocks[1, 4], 8: blocks[1, 8]})
        if self.taps > 1:
            channels = mask.reshape(mask.shape[0], -1, self.taps)
            kernels = fold(mask, self.taps, 1, np.uint16)
            self.kernels += np.bincount(kernels.reshape(-1), minlength=self.taps + 1)
            four = fold(channels, 4, 1)
            self._add_groups("channels", {4: four, 8: fold(four, 2, 1)})

    def _add_blocks(self, block_shape: tuple[int, int], counts: np.ndarray, rows: int) -> None:
        if not counts.size:
            return
        height, width = block_shape
        occupied = counts != 0
        per_block_row = np.count_nonzero(occupied, axis=1)
        cut_width = counts.shape[1] * width - self.shape[1]
        heights = np.full(counts.shape[0], height)
        heights[-1] = rows - (counts.shape[0] - 1) * height
        cells = heights * (width * per_block_row - cut_width * occupied[:, -1])
        self.occupied[block_shape] += int(per_block_row.sum())
        self.covered[block_shape] += int(cells.sum())

    def _add_groups(self, along: str, counts: dict[int, np.ndarray]) -> None:
        for n, m in NM_PATTERNS:
            self.violations[n, m, along] += int(np.count_nonzero(counts[m] > n))

    def result(self) -> Counts:
        """Return what was counted."""
        none = [np.zeros(self.shape[0], np.int64)]
        rows = np.concatenate(self.rows or none)
        nnz = int(rows.sum())
        return Counts(
            shape=self.shape,
            taps=self.taps,
            nnz=nnz,
            rows=rows,
            columns=self.columns,
            row_changes=np.concatenate(self.changes.rows or none),
            column_changes=self.changes.columns,
            kernels=self.kernels if self.taps > 1 else None,
            blocks=tuple(self._block_fit(shape, nnz) for shape in BLOCK_SHAPES),
            nm=tuple(self._nm_fit(n, m, along) for n, m, along in self.violations),
            tiles=self.tiles.fits(),
        )

    def _block_fit(self, block_shape: tuple[int, int], nnz: int) -> BlockFit:
        height, width = block_shape
        blocks = -(-self.shape[0] // height) * -(-self.shape[1] // width)
        occupied, covered = self.occupied[block_shape], self.covered[block_shape]
        return BlockFit(
            block_shape=block_shape,
            blocks=blocks,
            occupied=occupied,
            covered=covered,
            occupancy=occupied / blocks if blocks else 0.0,
            fill=nnz / covered if covered else 0.0,
        )

    def _nm_fit(self, n: int, m: int, along: str) -> NMFit:
        rows, columns = self.shape
        if along == "columns":
            groups = rows * -(-columns // m)
        else:
            groups = rows * self.taps * -(-(columns // self.taps) // m)
        return NMFit(n, m, along, groups, self.violations[n, m, along])
