"""The units of a pattern: their ranks from the scores of elements, and back to elements.

Weights are [output rows, input channels, taps]. A unit ranks by the mean square of its elements'
scores, single elements by their score; a unit of zeros ranks as `DEAD`.
"""

from __future__ import annotations

import numpy as np

from .patterns import VNM_COLUMNS, Pattern
from .selection import DEAD, lowest_share, outside_n_of_m


def rank_units(scores: np.ndarray, dead: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Rank units: [rows, channels, taps], [block rows, block columns], [rows, channels] or [rows].

    Parameters
    ----------
    scores : numpy.ndarray
        Of the elements, none negative or NaN.
    dead : numpy.ndarray of bool
        Elements that are zero already.
    """
    if pattern.kind == "unstructured":
        return np.where(dead, scores.dtype.type(DEAD), scores)
    if pattern.kind == "block":
        return _rank_blocks(scores, dead, *pattern.size)
    axes = (2,) if pattern.kind == "kernel" else (1, 2)
    if not scores.size:
        return np.zeros(scores.shape[: axes[0]])
    means = np.square(scores, dtype=np.float64).mean(axis=axes)
    return np.where(dead.all(axis=axes), DEAD, means)


def _rank_blocks(scores: np.ndarray, dead: np.ndarray, rows: int, columns: int) -> np.ndarray:
    if not scores.size:
        return np.zeros((0, 0))
    matrix = scores.reshape(scores.shape[0], -1)
    sums = block_sums(np.square(matrix, dtype=np.float64), rows, columns)
    sizes = block_sums(np.ones(matrix.shape, np.int64), rows, columns)
    alive = block_sums((~dead).reshape(matrix.shape).astype(np.int64), rows, columns)
    return np.where(alive == 0, DEAD, sums / sizes)


def block_sums(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Sum over blocks; those at the edges are smaller."""
    row_starts = np.arange(0, matrix.shape[0], rows)
    column_starts = np.arange(0, matrix.shape[1], columns)
    return np.add.reduceat(np.add.reduceat(matrix, row_starts, 0), column_starts, 1)


def elements(cut: np.ndarray, shape: tuple[int, ...], pattern: Pattern) -> np.ndarray:
    """Spread a decision over units to the elements of [rows, channels, taps]."""
    if not cut.size:
        return np.zeros(shape, bool)
    if pattern.kind == "block":
        wide = np.repeat(np.repeat(cut, pattern.size[0], 0), pattern.size[1], 1)
        return wide[: shape[0], : shape[1] * shape[2]].reshape(shape)
    return np.broadcast_to(cut.reshape(cut.shape + (1,) * (3 - cut.ndim)), shape)


def cut_rows(ranks: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Cut the same share of units in every row of units."""
    cut = [lowest_share(row.ravel(), share, rng) for row in ranks]
    return np.reshape(cut, ranks.shape).astype(bool)


def cut_n_of_m(
    scores: np.ndarray, dead: np.ndarray, pattern: Pattern, rng: np.random.Generator
) -> np.ndarray:
    """Cut all but N of every M input channels; in V:N:M all but 4 of M for V rows together first.

    V:N:M is the pattern of R. Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the
    Power of Sparse Tensor Cores", SC 2023.
    """
    n, m = pattern.size[-2:]
    ranks = np.where(dead, scores.dtype.type(DEAD), scores)
    if pattern.kind == "n:m" or not scores.size:
        return outside_n_of_m(ranks, n, m, rng)
    squares = np.square(np.where(dead, 0, scores), dtype=np.float64)
    rows = pattern.size[0]
    together = np.add.reduceat(squares, np.arange(0, scores.shape[0], rows), 0)
    columns = np.repeat(outside_n_of_m(together, VNM_COLUMNS, m, rng), rows, 0)[: scores.shape[0]]
    return columns | outside_n_of_m(np.where(columns, 1.5 * DEAD, ranks), n, m, rng)
