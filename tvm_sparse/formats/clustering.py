"""Row orders that bring rows with common columns together."""

from __future__ import annotations

import numpy as np

# Shrink the candidates' bitsets when this share of them was taken: keeps the scan over what is
# left.
_COMPACT_BELOW = 0.7


def cluster_rows(nonzero: np.ndarray, panel: int) -> np.ndarray:
    """Order rows so that each run of `panel` rows shares columns.

    Greedy: a panel starts with the first row left and takes, one by one, the row that shares most
    columns with it, relative to the square root of the row's own count. Bitsets and popcounts make
    it rows^2 * columns / 64 / panel steps.

    Parameters
    ----------
    nonzero : numpy.ndarray of bool, [rows, columns]
    panel : int
        Rows a panel, at least 1.

    Returns
    -------
    numpy.ndarray of int32, [rows]
        A permutation of the rows.
    """
    rows = nonzero.shape[0]
    bits = _bitsets(nonzero)
    scale = 1.0 / np.sqrt(nonzero.sum(1) + 1.0)
    left = np.arange(rows)
    alive = np.ones(rows, bool)
    order: list[int] = []
    first = 0
    while len(order) < rows:
        while not alive[first]:
            first += 1
        union = _take(first, left, alive, order, bits)
        for _ in range(min(panel, rows - len(order) + 1) - 1):
            shared = np.bitwise_count(bits & union).sum(1, dtype=np.int32)
            score = np.where(alive, shared * scale, -1.0)
            union |= _take(int(score.argmax()), left, alive, order, bits)
        if alive.mean() < _COMPACT_BELOW and len(order) < rows:
            left, bits, scale, first = left[alive], bits[alive], scale[alive], 0
            alive = np.ones(len(left), bool)
    return np.array(order, np.int32)


def _take(
    at: int, left: np.ndarray, alive: np.ndarray, order: list[int], bits: np.ndarray
) -> np.ndarray:
    alive[at] = False
    order.append(int(left[at]))
    return bits[at].copy()


def _bitsets(nonzero: np.ndarray) -> np.ndarray:
    rows, columns = nonzero.shape
    padded = np.zeros((rows, -(-columns // 64) * 64), bool)
    padded[:, :columns] = nonzero
    return np.packbits(padded, axis=1).view(np.uint64)
