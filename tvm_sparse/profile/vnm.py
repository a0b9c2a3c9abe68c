"""V:N:M: every V rows choose four of each M columns, and each row has at most N nonzeros in them.

References
----------
R. L. Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor
Cores", SC 2023, section 3.
"""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .chance import Null, log_at_least
from .counts import fold
from .groups import sampled_shares
from .parts import CHANCE, EXPLAINED, NEAR
from .zeros import Zeros

HEIGHTS = (16, 32, 64, 128, 256)
WIDTHS = (*range(5, 17), 20, 24, 32, 40, 48, 64, 80, 100, 128)
MOST = (1, 2)
CHOSEN = 4
_TRIES = len(HEIGHTS) * len(WIDTHS) * len(MOST)
# Groups of the sample that may have too many nonzeros.
_HINT_BROKEN = 0.1
_CELLS_AT_A_TIME = 1 << 20


def vnm_finding(zeros: Zeros) -> Finding | None:
    """Return the V:N:M of most rows that holds, or nearly does."""
    shape = zeros.counts.shape
    widths = [m for m in WIDTHS if shape[1] % m == 0]
    for m, shares in sampled_shares(zeros, "columns", widths).items():
        for n in MOST:
            allowed = n * zeros.counts.size // m
            if shares[n] > _HINT_BROKEN or zeros.counts.nnz < EXPLAINED * allowed:
                continue
            for height in reversed(HEIGHTS):
                finding = _judge(zeros, height, n, m) if height <= shape[0] else None
                if finding:
                    return finding
    return None


def _judge(zeros: Zeros, height: int, n: int, m: int) -> Finding | None:
    counts, places = zeros.counts, n * zeros.counts.size // m
    held = fold(zeros.mask, height, 0, np.uint16).reshape(-1, zeros.counts.shape[1] // m, m)
    chosen = np.zeros(held.shape, np.uint8)
    order = np.argpartition(held, m - CHOSEN, axis=2)[:, :, m - CHOSEN :]
    np.put_along_axis(chosen, order, 1, axis=2)
    outside = counts.nnz - int((held * chosen).sum(dtype=np.int64))
    if outside > NEAR * counts.nnz:
        return None
    violations = outside + _too_many(zeros, chosen.reshape(len(held), -1), height, n, m)
    fill = (counts.nnz - violations) / places
    if violations > NEAR * counts.nnz or fill < EXPLAINED:
        return None
    chance = _log_chance(zeros, held, height) + math.log(_TRIES)
    if chance > math.log(CHANCE):
        return None
    explained = min(1.0, (counts.size - places - violations) / (counts.size - counts.nnz))
    form = f"{height}:{n}:{m}"
    return Finding(form, violations, explained, fill, chance / math.log(10), along="columns")


def _too_many(zeros: Zeros, chosen: np.ndarray, height: int, n: int, m: int) -> int:
    """Count the nonzeros above N that rows have in their chosen columns."""
    step = max(1, _CELLS_AT_A_TIME // (height * zeros.counts.shape[1]))
    total = 0
    for tile in range(0, len(chosen), step):
        mask = zeros.mask[tile * height : (tile + step) * height]
        kept = mask & np.repeat(chosen[tile : tile + step], height, axis=0)[: len(mask)]
        held = fold(kept, m, 1)
        total += int((held[held > n] - np.uint8(n)).sum(dtype=np.int64))
    return total


def _log_chance(zeros: Zeros, held: np.ndarray, height: int) -> float:
    """Bound the log probability that so many groups of columns have at most four in use.

    That all nonzeros of a group of M columns lie in four of them is at most as probable as that the
    others are empty, times the choices of four. The event is decreasing in the nonzeros.
    """
    tiles, groups, m = held.shape
    null = Null(zeros.counts.size, zeros.counts.nnz)
    last = zeros.counts.shape[0] - (tiles - 1) * height
    expected = 0.0
    for rows, count in ((height, tiles - 1), (last, 1)):
        log = math.log(math.comb(m, CHOSEN)) + null.log_empty((m - CHOSEN) * rows)
        expected += count * groups * math.exp(min(0.0, log))
    found = int(np.count_nonzero(np.count_nonzero(held, axis=2) <= CHOSEN))
    return log_at_least(found, expected)
