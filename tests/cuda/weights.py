"""Weights with the patterns that kernels for GPUs are planned for."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tvm_sparse.dtypes import numpy_dtype


def n_of_m(rng: np.random.Generator, rows: int, columns: int, n: int, m: int) -> np.ndarray:
    """Keep `n` of each `m` neighbours of a row; what is behind whole groups stays."""
    groups = columns // m
    places = np.argsort(rng.random((rows, groups, m)), axis=2)[..., :n]
    kept = np.zeros((rows, groups, m), bool)
    np.put_along_axis(kept, places, True, axis=2)
    return np.concatenate([kept.reshape(rows, -1), np.ones((rows, columns % m), bool)], axis=1)


def v_n_m(rng: np.random.Generator, rows: int, columns: int, v: int, m: int) -> np.ndarray:
    """Keep, in every tile of `v` rows, four of each `m` columns, and two of four in them."""
    chosen = np.repeat(n_of_m(rng, -(-rows // v), columns, 4, m), v, axis=0)[:rows]
    kept = np.zeros((rows, columns), bool)
    for first in range(0, rows, v):
        named = np.flatnonzero(chosen[first])
        kept[first : first + v, named] = n_of_m(rng, len(kept[first : first + v]), len(named), 2, 4)
    return kept


def blocks(
    rng: np.random.Generator, rows: int, columns: int, size: tuple[int, int], density: float
) -> np.ndarray:
    """Keep whole blocks."""
    height, width = size
    kept = rng.random((-(-rows // height), -(-columns // width))) < density
    return np.repeat(np.repeat(kept, height, axis=0), width, axis=1)[:rows, :columns]


_PATTERNS = {
    "2:4": lambda rng, rows, columns: n_of_m(rng, rows, columns, 2, 4),
    "V:N:M": lambda rng, rows, columns: v_n_m(rng, rows, columns, 64, 16),
    "tile-wise": lambda rng, rows, columns: blocks(rng, rows, columns, (128, 1), 0.25),
    "blocks of 32": lambda rng, rows, columns: blocks(rng, rows, columns, (32, 32), 0.1),
    "blocks of 16": lambda rng, rows, columns: blocks(rng, rows, columns, (16, 16), 0.1),
    "unstructured": lambda rng, rows, columns: rng.random((rows, columns)) < 0.1,
    "dense": lambda rng, rows, columns: np.ones((rows, columns), bool),
}


@lru_cache(maxsize=8)
def pattern(name: str, rows: int, columns: int, dtype: str = "float16") -> np.ndarray:
    """Draw a matrix [rows, columns]."""
    rng = np.random.default_rng(0)
    kept = _PATTERNS[name](rng, rows, columns)
    values = rng.uniform(0.5, 1, (rows, columns)).astype(np.float32)
    return (values * kept).astype(numpy_dtype(dtype))
