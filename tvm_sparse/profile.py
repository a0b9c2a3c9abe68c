"""What a pruned weight looks like: counts, blocks, N:M groups, and the pattern they amount to.

NumPy only. A weight is seen as the matrix W[rows, columns] of output features by input features; a
convolution has the columns (input channel, tap), taps innermost. Zero means ``w == 0``: -0.0 is
zero, NaN and Inf are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import ModelError
from .formats.tensor_tiles import listed_a_column

# Rows x columns of the blocks that kernels exist for; each is built from the smaller ones.
BLOCK_SHAPES: tuple[tuple[int, int], ...] = ((4, 1), (8, 1), (16, 1), (1, 16), (16, 16), (32, 32))
# At most N nonzeros in every M neighbours, from the tightest on.
NM_PATTERNS: tuple[tuple[int, int], ...] = ((1, 4), (2, 4), (4, 8))

# Rows of the tiles that kernels for tensor cores compute, each built from the smaller ones, and
# neighbouring columns that they may fetch as one.
TILE_HEIGHTS: tuple[int, ...] = (16, 32, 64, 128, 256)
TILE_RUN = 8
# Columns of a tile that are arranged as two of four, to see how often they are listed: so many
# neighbours here and there.
_SAMPLED, _SAMPLED_TOGETHER = 512, 16

# A pattern is claimed when a random matrix of the same size and nonzero count shows it with at most
# this probability ...
CHANCE = 1e-9
# ... and when it explains at least this share of the zeros, and of the cells that it keeps.
EXPLAINED = 0.9
# From this density on a weight is called dense: no kernel gains anything from the rest.
DENSE = 0.95

# Cells looked at in one go: the boolean copies of it stay in a core's cache.
_CHUNK_CELLS = 1 << 20


@dataclass(frozen=True)
class CountStats:
    """Nonzeros per row or per column; `cv` is the standard deviation over the mean."""

    mean: float
    min: int
    max: int
    cv: float


@dataclass(frozen=True)
class BlockFit:
    """How well aligned blocks of one shape cover the nonzeros.

    Attributes
    ----------
    block_shape : tuple of int
        Rows and columns of a block; blocks at the lower and right edge may be cut.
    blocks, occupied : int
        All blocks, and those that hold a nonzero.
    covered : int
        Cells of the occupied blocks.
    occupancy : float
        `occupied / blocks`; 0 without blocks.
    fill : float
        Density inside the occupied blocks; 0 without any.
    """

    block_shape: tuple[int, int]
    blocks: int
    occupied: int
    covered: int
    occupancy: float
    fill: float


@dataclass(frozen=True)
class NMFit:
    """Whether at most `n` of every `m` neighbours are nonzero.

    Attributes
    ----------
    along : str
        "columns": neighbouring columns of a row. "channels": the same tap of neighbouring input
        channels, which is what N:M hardware wants of a convolution.
    groups, violations : int
        All groups (the last one of a row may be short), and those with more than `n` nonzeros.
    """

    n: int
    m: int
    along: str
    groups: int
    violations: int

    @property
    def holds(self) -> bool:
        """No group has too many nonzeros."""
        return self.violations == 0


@dataclass(frozen=True)
class TileFit:
    """What tiles of `height` rows need, each its own columns; rows without a nonzero are left out.

    Attributes
    ----------
    height, tiles : int
    columns : int
        Columns with a nonzero, of all tiles together.
    run_columns : int
        Columns in aligned runs of `TILE_RUN` with a nonzero.
    full_columns, full_run_columns : int
        Columns with a nonzero in more than half of a tile's rows, and those in runs with one.
    listed, rest_listed : tuple of float
        How often a column is listed to make a tile two of four (one of two in float32), single and
        in runs: of all columns with a nonzero, and without full ones. Seen in the first tile.
    """

    height: int
    tiles: int
    columns: int
    run_columns: int
    full_columns: int
    full_run_columns: int
    listed: tuple[float, float]
    rest_listed: tuple[float, float]


@dataclass(frozen=True)
class SparsityProfile:
    """The zeros of one weight matrix.

    Attributes
    ----------
    shape : tuple of int
        (rows, columns).
    taps : int
        Columns per input channel: kernel height x width of a convolution, 1 of a matmul.
    dtype : str
        Of the weight.
    nnz : int
        Elements that are not zero.
    density : float
        `nnz` over the size; 0 for a matrix without elements.
    row_nnz, column_nnz : CountStats
        Nonzeros per row and per column.
    empty_rows, empty_columns : int
        Rows and columns without a nonzero.
    empty_channels : int
        Input channels without a nonzero in any of their taps; `empty_columns` when `taps` is 1.
    empty_kernels : int or None
        Pairs of output and input channel without a nonzero; None when `taps` is 1.
    blocks : tuple of BlockFit
        One for each of `BLOCK_SHAPES`.
    nm : tuple of NMFit
        One for each of `NM_PATTERNS`, along the columns, then along the channels of a convolution.
    tiles : tuple of TileFit
        One for each of `TILE_HEIGHTS`.
    pattern : str
        The profile in a word: "empty" (no elements), "zero", "dense", "channel", "kernel",
        "block:RxC", "N:M" or "unstructured"; see `profile_weight`.
    """

    shape: tuple[int, int]
    taps: int
    dtype: str
    nnz: int
    density: float
    row_nnz: CountStats
    column_nnz: CountStats
    empty_rows: int
    empty_columns: int
    empty_channels: int
    empty_kernels: int | None
    blocks: tuple[BlockFit, ...]
    nm: tuple[NMFit, ...]
    tiles: tuple[TileFit, ...]
    pattern: str

    @property
    def size(self) -> int:
        """Elements, zero or not."""
        return self.shape[0] * self.shape[1]

    def block(self, rows: int, columns: int) -> BlockFit:
        """Look up the fit of one of `BLOCK_SHAPES`.

        Raises
        ------
        KeyError
            When that shape is not profiled.
        """
        for fit in self.blocks:
            if fit.block_shape == (rows, columns):
                return fit
        raise KeyError((rows, columns))

    def tile(self, height: int) -> TileFit:
        """Look up the fit of tiles of one of `TILE_HEIGHTS`.

        Raises
        ------
        KeyError
            When that height is not profiled.
        """
        for fit in self.tiles:
            if fit.height == height:
                return fit
        raise KeyError(height)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain data, ready for JSON."""
        return asdict(self)


def profile_weight(w: np.ndarray, *, taps: int = 1) -> SparsityProfile:
    """Profile the zeros of a weight.

    A pattern is claimed only where chance does not produce it. The null hypothesis is a matrix of
    the same shape whose `nnz` nonzeros fell on cells drawn without replacement; every claim needs a
    probability of at most `CHANCE` under it:

    - *channel*, *kernel*, *block:RxC*: the number of empty rows, columns, kernels or blocks. Its
      expectation E is exact (hypergeometric), and as the indicators "this one is empty" are
      negatively associated, Chernoff's bound ``P(X >= x) <= exp(-(x ln(x/E) - x + E))`` holds.
    - *N:M*, which has to hold exactly: the indicators "this group holds" are negatively associated
      too, so ``P(all hold)`` is at most the product of the hypergeometric probabilities.

    Significance alone would also claim blocks in weights whose nonzeros merely clump, as those of
    real networks do. Hence the empty parts must hold at least `EXPLAINED` of all zeros, and the
    rest must be dense to at least `EXPLAINED`. Where several claims stand, whole channels win, then
    the largest blocks, then the tightest N:M.

    Parameters
    ----------
    w : numpy.ndarray
        The weight as [rows, columns], of any floating or integer type; it may be strided.
    taps : int
        Columns per input channel, for a convolution.

    Raises
    ------
    ModelError
        When `w` is no matrix of numbers, or `taps` does not divide its columns.

    References
    ----------
    Joag-Dev and Proschan, "Negative association of random variables", Annals of Statistics 11
    (1983), for the claim about permutation distributions.
    """
    if w.ndim != 2:
        raise ModelError(f"a weight is profiled as a matrix, but this one has the shape {w.shape}")
    if taps < 1 or w.shape[1] % taps:
        raise ModelError(f"{w.shape[1]} columns are not a whole number of channels of {taps} taps")
    if w.dtype.kind in "OSUMmV" and not w.dtype.name.startswith(("bfloat", "float", "int")):
        raise ModelError(f"a weight of type {w.dtype} cannot be profiled")
    tally = _Tally(w.shape, taps, w.dtype)
    for chunk in _row_chunks(w):
        tally.add(chunk)
    return tally.profile(str(w.dtype))


def _row_chunks(w: np.ndarray) -> Iterator[np.ndarray]:
    """Yield uint8 masks of whole rows; all but the last hold a multiple of 32 rows."""
    rows, columns = w.shape
    step = max(32, _CHUNK_CELLS // max(columns, 1) // 32 * 32)
    for start in range(0, rows, step):
        yield (w[start : start + step] != 0).view(np.uint8)


def _fold(counts: np.ndarray, factor: int, axis: int, dtype: type | None = None) -> np.ndarray:
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
    four = _fold(mask, 4, 0)
    eight = _fold(four, 2, 0)
    sixteen = _fold(eight, 2, 0)
    square = _fold(sixteen, 16, 1, np.uint16)
    return {
        (4, 1): four,
        (8, 1): eight,
        (16, 1): sixteen,
        (1, 16): _fold(_fold(mask, 4, 1), 4, 1),
        (16, 16): square,
        (32, 32): _fold(_fold(square, 2, 0), 2, 1),
    }


def _group_counts(mask: np.ndarray, axis: int) -> dict[int, np.ndarray]:
    """Nonzeros of every 4 and every 8 neighbours along `axis`."""
    four = _fold(mask, 4, axis)
    return {4: four, 8: _fold(four, 2, axis)}


class _TileTally:
    """Counts of tiles, whose rows are those with a nonzero."""

    def __init__(self, columns: int, dtype: np.dtype) -> None:
        self.dtype = np.float16 if dtype.itemsize == 2 else np.float32
        self.left = np.zeros((0, columns), np.uint8)
        self.counts = {height: [0] * 5 for height in TILE_HEIGHTS}
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
        held = _fold(_fold(rows, 4, 0), 4, 0)
        for height in TILE_HEIGHTS:
            if height > TILE_HEIGHTS[0]:
                # As many rows as eight bits cannot count.
                held = _fold(held, 2, 0, np.uint16 if height > 128 else None)
            full = held > height // 2
            found = (
                len(held),
                np.count_nonzero(held),
                _in_runs(held > 0),
                np.count_nonzero(full),
                _in_runs(full),
            )
            self.counts[height] = [
                int(a + b) for a, b in zip(self.counts[height], found, strict=True)
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
        nothing = [(1.0, 1.0)] * 2
        return tuple(
            TileFit(height, *self.counts[height], *self.listed.get(height, nothing))
            for height in TILE_HEIGHTS
        )


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
    return TILE_RUN * np.count_nonzero(_fold(chosen.view(np.uint8), TILE_RUN, 1))


class _Tally:
    """Counts gathered over chunks of rows; the rows of a chunk start at a multiple of 32."""

    def __init__(self, shape: tuple[int, int], taps: int, dtype: np.dtype) -> None:
        self.shape = shape
        self.taps = taps
        self.rows: list[np.ndarray] = []
        self.columns = np.zeros(shape[1], np.int64)
        self.occupied = dict.fromkeys(BLOCK_SHAPES, 0)
        self.covered = dict.fromkeys(BLOCK_SHAPES, 0)
        self.empty_kernels = 0
        self.tiles = _TileTally(shape[1], dtype)
        alongs = ("columns",) if taps == 1 else ("columns", "channels")
        self.violations = {(n, m, along): 0 for along in alongs for n, m in NM_PATTERNS}

    def add(self, mask: np.ndarray) -> None:
        """Count `mask`, the uint8 nonzero mask [rows of this chunk, columns]."""
        blocks = _block_counts(mask)
        self.tiles.add(mask)
        self.rows.append(blocks[1, 16].sum(axis=1, dtype=np.int64))
        self.columns += blocks[16, 1].sum(axis=0, dtype=np.int64)
        for block_shape, counts in blocks.items():
            self._add_blocks(block_shape, counts, mask.shape[0])
        self._add_groups("columns", _group_counts(mask, 1))
        if self.taps > 1:
            channels = mask.reshape(mask.shape[0], -1, self.taps)
            self.empty_kernels += int(np.count_nonzero(~channels.any(axis=2)))
            self._add_groups("channels", _group_counts(channels, 1))

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

    def profile(self, dtype: str) -> SparsityProfile:
        """Turn the counts into a profile."""
        rows = np.concatenate(self.rows) if self.rows else np.zeros(self.shape[0], np.int64)
        size = self.shape[0] * self.shape[1]
        nnz = int(rows.sum())
        channels = self.columns.reshape(-1, self.taps)
        counted = _Counted(
            shape=self.shape,
            taps=self.taps,
            nnz=nnz,
            empty_rows=int(np.count_nonzero(rows == 0)),
            empty_channels=int(np.count_nonzero(~channels.any(axis=1))),
            empty_kernels=self.empty_kernels if self.taps > 1 else None,
            blocks=tuple(self._block_fit(shape, nnz) for shape in BLOCK_SHAPES),
            nm=tuple(self._nm_fit(n, m, along) for n, m, along in self.violations),
        )
        return SparsityProfile(
            shape=counted.shape,
            taps=counted.taps,
            dtype=dtype,
            nnz=nnz,
            density=nnz / size if size else 0.0,
            row_nnz=_stats(rows),
            column_nnz=_stats(self.columns),
            empty_rows=counted.empty_rows,
            empty_columns=int(np.count_nonzero(self.columns == 0)),
            empty_channels=counted.empty_channels,
            empty_kernels=counted.empty_kernels,
            blocks=counted.blocks,
            nm=counted.nm,
            tiles=self.tiles.fits(),
            pattern=_pattern(counted),
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


def _stats(counts: np.ndarray) -> CountStats:
    if not counts.size:
        return CountStats(0.0, 0, 0, 0.0)
    mean = float(counts.mean())
    cv = float(counts.std()) / mean if mean else 0.0
    return CountStats(mean, int(counts.min()), int(counts.max()), cv)


@dataclass(frozen=True)
class _Counted:
    """What the pattern is judged by."""

    shape: tuple[int, int]
    taps: int
    nnz: int
    empty_rows: int
    empty_channels: int
    empty_kernels: int | None
    blocks: tuple[BlockFit, ...]
    nm: tuple[NMFit, ...]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def _pattern(counted: _Counted) -> str:
    if not counted.size:
        return "empty"
    if not counted.nnz:
        return "zero"
    if counted.nnz >= DENSE * counted.size:
        return "dense"
    if _is_channel(counted):
        return "channel"
    if claims := _block_claims(counted):
        return max(claims)[-1]
    for fit in sorted(counted.nm, key=lambda fit: fit.n / fit.m):
        if fit.holds and _log_chance_of_nm(counted, fit) <= math.log(CHANCE):
            return f"{fit.n}:{fit.m}"
    return "unstructured"


def _is_channel(counted: _Counted) -> bool:
    rows, columns = counted.shape
    channels = columns // counted.taps
    kept = (rows - counted.empty_rows) * (channels - counted.empty_channels) * counted.taps
    if not _explains(counted, kept):
        return False
    by_rows = _log_chance_of_empty(counted, {columns: rows}, counted.empty_rows)
    by_channels = _log_chance_of_empty(
        counted, {rows * counted.taps: channels}, counted.empty_channels
    )
    return min(by_rows, by_channels) <= math.log(CHANCE)


def _block_claims(counted: _Counted) -> list[tuple[int, float, str]]:
    """Return the claims that stand, as (cells of a block, fill, word)."""
    claims: list[tuple[int, float, str]] = []
    for fit in counted.blocks:
        if not _explains(counted, fit.covered):
            continue
        sizes = _block_sizes(counted.shape, fit.block_shape)
        empty = fit.blocks - fit.occupied
        if _log_chance_of_empty(counted, sizes, empty) <= math.log(CHANCE):
            height, width = fit.block_shape
            claims.append((height * width, fit.fill, f"block:{height}x{width}"))
    if counted.empty_kernels is not None:
        kernels = counted.size // counted.taps
        kept = (kernels - counted.empty_kernels) * counted.taps
        chance = _log_chance_of_empty(counted, {counted.taps: kernels}, counted.empty_kernels)
        if _explains(counted, kept) and chance <= math.log(CHANCE):
            claims.append((counted.taps, counted.nnz / kept, "kernel"))
    return claims


def _explains(counted: _Counted, kept: int) -> bool:
    """Whether dropping all but `kept` cells drops nearly all zeros and leaves hardly any."""
    dropped = counted.size - kept
    zeros = counted.size - counted.nnz
    return dropped >= EXPLAINED * zeros and counted.nnz >= EXPLAINED * kept


def _block_sizes(shape: tuple[int, int], block_shape: tuple[int, int]) -> dict[int, int]:
    """Count the blocks of each size in cells; those at the edges may be smaller."""
    sizes: dict[int, int] = {}
    (tall, high), (wide, narrow) = (
        divmod(extent, side) for extent, side in zip(shape, block_shape, strict=True)
    )
    for height, down in ((block_shape[0], tall), (high, 1)):
        for width, across in ((block_shape[1], wide), (narrow, 1)):
            if height and width:
                sizes[height * width] = sizes.get(height * width, 0) + down * across
    return sizes


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_chance_of_empty(counted: _Counted, sizes: dict[int, int], empty: int) -> float:
    """Bound the log probability that `empty` or more parts hold no nonzero.

    `sizes` counts the parts by their cells; the parts are disjoint.
    """
    zeros = counted.size - counted.nnz
    every = _log_choose(counted.size, counted.nnz)
    expected = sum(
        count * math.exp(_log_choose(counted.size - cells, counted.nnz) - every)
        for cells, count in sizes.items()
        if cells <= zeros
    )
    if empty <= expected or not empty:
        return 0.0
    # An expectation that underflows is as good as this one, and has a logarithm.
    expected = max(expected, 1e-300)
    return -(empty * math.log(empty / expected) - empty + expected)


def _log_chance_of_nm(counted: _Counted, fit: NMFit) -> float:
    """Bound the log probability that every group holds."""
    zeros = counted.size - counted.nnz
    length = counted.shape[1] if fit.along == "columns" else counted.shape[1] // counted.taps
    lines = counted.size // length
    total = 0.0
    for cells, count in ((fit.m, length // fit.m * lines), (length % fit.m, lines)):
        if not count:
            continue
        # Counted from the violations, which are rare: 1 minus their probability loses no digits.
        broken = sum(
            math.comb(counted.nnz, held) * math.comb(zeros, cells - held)
            for held in range(fit.n + 1, cells + 1)
        )
        chance = broken / math.comb(counted.size, cells)
        total += count * math.log1p(-chance) if chance < 1 else -math.inf
    return total
