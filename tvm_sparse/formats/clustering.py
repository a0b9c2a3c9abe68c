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


# Rows of about the same number of nonzeros among which partners are sought.
_WINDOW = 64


def pair_rows(nonzero: np.ndarray) -> np.ndarray:
    """Order rows by falling number of nonzeros, in pairs that share columns.

    Rows are sorted by their nonzeros and cut in windows; in each window the longest row left takes
    the partner with which it shares most columns, less the difference of their lengths. Pairs are
    then sorted by length and, at the same length, by what they share.

    Parameters
    ----------
    nonzero : numpy.ndarray of bool, [rows, columns]
        An even number of rows.

    Returns
    -------
    numpy.ndarray of int64, [rows]
        A permutation of the rows; each two consecutive ones are a pair.
    """
    counts = nonzero.sum(1)
    order = np.argsort(-counts, kind="stable")
    pairs = [
        _pair_windows(nonzero, counts, order[first:last])
        for first, last in _window_bounds(len(order))
    ]
    both = np.concatenate(pairs)
    shared = (nonzero[both[:, 0]] & nonzero[both[:, 1]]).sum(1)
    return both[np.lexsort((-shared, -counts[both].max(1)))].reshape(-1)


def _window_bounds(rows: int) -> list[tuple[int, int]]:
    """Cut all rows in whole windows that are paired at once, and a shorter last one."""
    whole = rows // _WINDOW * _WINDOW
    return [(a, b) for a, b in ((0, whole), (whole, rows)) if b > a]


def _pair_windows(nonzero: np.ndarray, counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Pair rows within windows of `_WINDOW`, all windows step by step together."""
    size = min(_WINDOW, len(order))
    windows = order.reshape(-1, size)
    bits = nonzero[windows].astype(np.float32)
    score = bits @ bits.transpose(0, 2, 1)
    score -= np.abs(counts[windows][:, :, None] - counts[windows][:, None, :])
    score[:, np.arange(size), np.arange(size)] = -np.inf
    free = np.ones(windows.shape, bool)
    each = np.arange(len(windows))
    pairs = []
    for _ in range(size // 2):
        first = free.argmax(1)
        free[each, first] = False
        second = np.where(free, score[each, first], -np.inf).argmax(1)
        free[each, second] = False
        pairs.append(np.stack([windows[each, first], windows[each, second]], 1))
    return np.concatenate(pairs)
