"""Weights whose zeros lie in a known form, and weights whose zeros lie in none."""

from __future__ import annotations

import numpy as np


def dense(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values[values == 0] = 1
    return values


def keep(w: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, w, np.float32(0))


# ---------------------------------------------------------------------------------------------
# No form
# ---------------------------------------------------------------------------------------------


def unstructured(rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    return keep(dense(rows, columns, seed), mask)


def clumped(
    rows: int, columns: int, density: float, seed: int, sigmas: tuple[float, float] = (0.5, 0.7)
) -> np.ndarray:
    """Magnitude pruning of a weight whose rows and columns differ in scale, as real ones do."""
    rng = np.random.default_rng(seed)
    w = dense(rows, columns, seed)
    w *= np.exp(sigmas[0] * rng.standard_normal((rows, 1)))
    w *= np.exp(sigmas[1] * rng.standard_normal(columns))
    return _largest(w, density)


def clumped_kernels(rows: int, channels: int, taps: int, density: float, seed: int) -> np.ndarray:
    """Magnitude pruning of a convolution whose kernels differ in scale: most are empty."""
    rng = np.random.default_rng(seed)
    w = dense(rows, channels * taps, seed)
    w *= np.repeat(np.exp(0.55 * rng.standard_normal((rows, channels))), taps, axis=1)
    return _largest(w, density)


def _largest(w: np.ndarray, density: float) -> np.ndarray:
    return keep(w, np.abs(w) >= np.quantile(np.abs(w), 1 - density))


# ---------------------------------------------------------------------------------------------
# A form
# ---------------------------------------------------------------------------------------------


def blocky(
    rows: int,
    columns: int,
    block: tuple[int, int],
    density: float,
    seed: int = 0,
    offset: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Keep blocks at random; the first ones are cut so that the grid begins at `offset`."""
    cut = [(side - start) % side for side, start in zip(block, offset, strict=True)]
    shape = -(-(rows + cut[0]) // block[0]), -(-(columns + cut[1]) // block[1])
    grid = np.random.default_rng(seed).random(shape) < density
    mask = np.kron(grid, np.ones(block, bool))[cut[0] :, cut[1] :]
    return keep(dense(rows, columns, seed), mask[:rows, :columns])


def n_of_m(rows: int, columns: int, n: int, m: int, seed: int = 0) -> np.ndarray:
    order = np.random.default_rng(seed).random((rows, columns // m, m)).argsort(axis=2)
    return keep(dense(rows, columns, seed), (order < n).reshape(rows, columns))


def v_n_m(rows: int, columns: int, v: int, n: int, m: int, seed: int = 0) -> np.ndarray:
    """Let every `v` rows choose four of `m` columns, and each row keep `n` of the four."""
    rng = np.random.default_rng(seed)
    groups = columns // m
    four = rng.random((-(-rows // v), groups, m)).argsort(axis=2)[:, :, :4]
    four = np.repeat(four, v, axis=0)[:rows]
    kept = rng.random((rows, groups, 4)).argsort(axis=2)[:, :, :n]
    mask = np.zeros((rows, groups, m), bool)
    np.put_along_axis(mask, np.take_along_axis(four, kept, axis=2), True, axis=2)
    return keep(dense(rows, columns, seed), mask.reshape(rows, columns))


def tile_wise(
    rows: int, columns: int, height: int, share: float, seed: int = 0, rows_kept: float = 0.5
) -> np.ndarray:
    """Drop whole rows; let every tile of the others keep a share of the columns, more or less."""
    rng = np.random.default_rng(seed)
    survivors = np.sort(rng.permutation(rows)[: round(rows_kept * rows)])
    mask = np.zeros((rows, columns), bool)
    for first in range(0, len(survivors), height):
        tile = survivors[first : first + height]
        mask[tile] = rng.random(columns) < share * rng.uniform(0.6, 1.4)
    return keep(dense(rows, columns, seed), mask)


# ---------------------------------------------------------------------------------------------
# What blurs it
# ---------------------------------------------------------------------------------------------


def thinned(w: np.ndarray, share: float = 0.05, seed: int = 1001) -> np.ndarray:
    """Set a share of the nonzeros to zero."""
    return keep(w, np.random.default_rng(seed).random(w.shape) >= share)


def strewn(w: np.ndarray, share: float = 0.01, seed: int = 1002) -> np.ndarray:
    """Set zeros to one: as many as a share of the nonzeros."""
    rng = np.random.default_rng(seed)
    count = max(1, round(share * np.count_nonzero(w)))
    out = w.copy()
    out.reshape(-1)[rng.choice(np.flatnonzero(w.reshape(-1) == 0), count, replace=False)] = 1
    return out
