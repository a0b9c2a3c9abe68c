"""The profile of a weight's zeros, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..findings import Finding

# Rows x columns of the aligned blocks that every weight is counted in, each built from the smaller
# ones.
BLOCK_SHAPES: tuple[tuple[int, int], ...] = (
    (4, 1),
    (8, 1),
    (16, 1),
    (1, 4),
    (1, 8),
    (1, 16),
    (4, 4),
    (8, 8),
    (16, 16),
    (32, 32),
    (64, 64),
)
# At most N nonzeros in every M neighbours, from the tightest on.
NM_PATTERNS: tuple[tuple[int, int], ...] = ((1, 4), (2, 4), (4, 8))

# Rows of the tiles that kernels for tensor cores compute, each built from the smaller ones, and
# neighbouring columns that they may fetch as one.
TILE_HEIGHTS: tuple[int, ...] = (16, 32, 64, 128, 256)
TILE_RUN = 8


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
    full_columns, full_run_columns, full_nnz : int
        Columns with a nonzero in more than half of a tile's rows, those in runs with one, and the
        nonzeros in the former.
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
    full_nnz: int
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
        The profile in a word: "empty" (no elements), "zero", "dense", the word of the first of
        `findings`, or "unstructured".
    findings : tuple of Finding
        Forms that were recognised, the most telling one first; see `profile_weight`.
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
    findings: tuple[Finding, ...] = ()

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
