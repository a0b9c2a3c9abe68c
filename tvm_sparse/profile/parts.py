"""A matrix cut into disjoint parts, some kept and the others dropped: how well that explains it.

Blocks, kernels of a convolution, rows, and the columns of tiles are all judged here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .chance import Null, log_at_least

# A form is claimed when a random matrix of the same size and nonzero count shows it with at most
# this probability ...
CHANCE = 1e-9
# ... and when it explains at least this share of the zeros, and of the cells that it keeps.
EXPLAINED = 0.9
# A form nearly holds with at most this share of the nonzeros where it has none.
NEAR = 0.02
# Kept parts that are expected to look like dropped ones with a few nonzeros.
_MISTAKEN = 0.001
# What is a surprise in a line, see `log_chance_in_lines`.
_SURPRISE = 0.01
# In parts of fewer cells, one zero too many and one nonzero too many look the same.
TELLING = 4


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of a matrix.

    Attributes
    ----------
    histograms : mapping of int to numpy.ndarray
        For parts of so many cells: how many of them hold 0, 1, 2, ... nonzeros.
    """

    histograms: Mapping[int, np.ndarray]

    @property
    def uncut(self) -> Parts:
        """Those that the edge of the matrix did not cut."""
        most = max(self.histograms)
        return Parts({most: self.histograms[most]})

    @property
    def null(self) -> Null:
        """The hypothesis that nonzeros fell on these parts at random."""
        size = sum(cells * int(h.sum()) for cells, h in self.histograms.items())
        return Null(size, sum(_nonzeros(h) for h in self.histograms.values()))

    def above(self, limits: Mapping[int, int]) -> tuple[int, int, int]:
        """Return parts with more nonzeros than the limit of their size, their cells, nonzeros."""
        parts = cells = nonzeros = 0
        for size, histogram in self.histograms.items():
            kept = histogram.copy()
            kept[: limits[size] + 1] = 0
            parts += int(kept.sum())
            cells += size * int(kept.sum())
            nonzeros += _nonzeros(kept)
        return parts, cells, nonzeros


@dataclass(frozen=True)
class Split:
    """Parts that are kept, and those that are dropped but for `violations` nonzeros."""

    kept_cells: int
    violations: int
    null: Null

    @property
    def fill(self) -> float:
        """Density of what is kept."""
        return (self.null.nnz - self.violations) / self.kept_cells if self.kept_cells else 0.0

    @property
    def explained(self) -> float:
        """Share of the zeros that are in dropped parts."""
        dropped = self.null.size - self.kept_cells - self.violations
        return dropped / self.null.zeros if self.null.zeros else 0.0

    def stands(self, violations: float = NEAR, least: float = EXPLAINED) -> bool:
        """Whether nearly all zeros are explained by what is kept, and nearly nothing else is."""
        few = self.violations <= violations * self.null.nnz
        return few and self.explained >= least and self.fill >= least


def histogram(counts: np.ndarray, cells: int) -> np.ndarray:
    """Count the parts of `cells` that hold 0, 1, ... nonzeros."""
    return np.bincount(counts.reshape(-1), minlength=cells + 1)


def split(parts: Parts) -> Split:
    """Tell kept parts from dropped ones.

    Both may be blurred: kept parts by zeros that fell into them, dropped ones by nonzeros. A part
    with more than half of its cells nonzero is kept. So is one with fewer, if that many zeros in
    some kept part are no surprise: with the density f of the parts above one half, the limit is
    the largest number that fewer than `_MISTAKEN` of them are expected to stay within, by the
    binomial distribution of n cells and f. A part of fewer than `TELLING` cells is kept by any
    nonzero.
    """
    half = {cells: cells // 2 for cells in parts.histograms}
    full, cells_of_full, nonzeros = parts.above(half)
    density = nonzeros / cells_of_full if cells_of_full else 1.0
    limits = {cells: max(0, min(half[cells], _limit(cells, density, full))) for cells in half}
    _, kept_cells, inside = parts.above(limits)
    return Split(kept_cells, parts.null.nnz - inside, parts.null)


def log_chance(parts: Parts) -> float:
    """Bound the log probability of parts this empty, or this full, under the null hypothesis."""
    expected = _Expected()
    for cells, counts in parts.histograms.items():
        expected.add(int(counts.sum()), parts.null.held(cells))
    return expected.log_chance(parts)


def log_chance_within(parts: Parts, nonzeros: np.ndarray, length: int) -> float:
    """Bound the same probability for parts of lines that all keep their own nonzeros.

    Rows and columns of real weights differ in scale; a full one is full in every part of it. Here
    nonzeros fell at random within each line only. Lines are independent of each other, and so
    indicators remain negatively associated.

    Parameters
    ----------
    nonzeros : numpy.ndarray
        Of each line, of which `parts` are equal shares but for what is cut at the ends.
    length : int
        Cells of a line.
    """
    expected = _Expected()
    for cells, counts in parts.histograms.items():
        each = int(counts.sum()) / len(nonzeros)
        for held, lines in zip(*np.unique(nonzeros, return_counts=True), strict=True):
            expected.add(each * int(lines), Null(length, int(held)).held(cells))
    return expected.log_chance(parts)


def log_chance_in_lines(counts: Mapping[int, np.ndarray]) -> float:
    """Bound the same probability as `log_chance_within`, by the parts that would be a surprise.

    A line without a nonzero has empty parts for certain, and one with few has them often. Looking
    at lines only where a part is unlikely to be empty (or full) by the line's own nonzeros leaves
    what those do not explain.

    Parameters
    ----------
    counts : mapping of int to numpy.ndarray
        For parts of so many cells of each line: their nonzeros, [parts, lines].
    """
    totals = sum(held.sum(axis=0, dtype=np.int64) for held in counts.values())
    length = sum(cells * len(held) for cells, held in counts.items())
    kinds, line = np.unique(totals, return_inverse=True)
    expected, found = _Expected(), _Expected()
    for cells, held in counts.items():
        half = cells // 2
        chances = np.array([Null(length, int(kind)).held(cells) for kind in kinds])
        for name, chance, seen in (
            ("empty", chances[:, 0], held == 0),
            ("low", chances[:, : half + 1].sum(axis=1), held <= half),
            ("full", chances[:, half + 1 :].sum(axis=1), held > half),
        ):
            telling = (chance < _SURPRISE)[line]
            add = len(held) * float(chance[line][telling].sum())
            setattr(expected, name, getattr(expected, name) + add)
            setattr(found, name, getattr(found, name) + int(seen[:, telling].sum()))
    return expected.log_chance_of(found)


class _Expected:
    """How many parts are expected to be empty, more than half full, and at most that."""

    def __init__(self) -> None:
        self.empty = self.low = self.full = 0.0

    def add(self, parts: float, chances: np.ndarray) -> None:
        """Add parts that hold 0, 1, ... nonzeros with these chances."""
        half = (len(chances) - 1) // 2
        self.empty += parts * float(chances[0])
        self.low += parts * float(chances[: half + 1].sum())
        self.full += parts * float(chances[half + 1 :].sum())

    def log_chance(self, parts: Parts) -> float:
        """Return the smallest of three bounds, times three."""
        found = _Expected()
        for counts in parts.histograms.values():
            found.add(1.0, counts)
        return self.log_chance_of(found)

    def log_chance_of(self, found: _Expected) -> float:
        """Do the same for numbers that were found."""
        return math.log(3) + min(
            log_at_least(found.empty, self.empty),
            log_at_least(found.low, self.low),
            log_at_least(found.full, self.full),
        )


def _limit(cells: int, density: float, parts: int) -> int:
    """Return the largest number of nonzeros that hardly any of `parts` kept ones would have."""
    if cells < TELLING:
        return 0
    if density >= 1:
        return cells
    k = np.arange(cells + 1)
    logs = np.concatenate([[0], np.cumsum(np.log((cells - k[:-1]) / (k[:-1] + 1)))])
    logs = logs + k * math.log(density) + (cells - k) * math.log1p(-density)
    within = parts * np.cumsum(np.exp(logs)) <= _MISTAKEN
    return int(np.count_nonzero(within)) - 1


def _nonzeros(counts: np.ndarray) -> int:
    return int(counts @ np.arange(len(counts)))
