"""Whole output features and input channels."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .chance import Null, log_at_least
from .parts import CHANCE, Split
from .zeros import Zeros


def channel_finding(zeros: Zeros) -> Finding | None:
    """Return what empty rows and input channels explain, or nearly empty ones.

    Those count as dropped that have less than half as many nonzeros as the fullest. The chance is
    that of so many rows (or channels) with at most as many nonzeros as the fullest dropped one; as
    that number is taken from the weight, it is multiplied by how many numbers there might be.
    """
    counts = zeros.counts
    rows = counts.rows > counts.rows.max() / 2
    channels = counts.channels > counts.channels.max() / 2
    # Of one row alone, to keep just its nonzeros explains everything and says nothing.
    if rows.sum() == 1:
        channels = np.ones_like(channels)
    elif channels.sum() == 1:
        rows = np.ones_like(rows)
    if rows.all() and channels.all():
        return None
    kept = int(rows.sum()) * int(channels.sum()) * counts.taps
    null = Null(counts.size, counts.nnz)
    # What is outside is not known yet; without any it would have to stand.
    if not Split(kept, 0, null).stands():
        return None
    cut = Split(kept, counts.nnz - _inside(zeros, rows, channels), null)
    chance = min(
        _log_chance(null, counts.rows, rows, counts.shape[1]),
        _log_chance(null, counts.channels, channels, counts.shape[0] * counts.taps),
    )
    if not cut.stands() or chance > math.log(CHANCE):
        return None
    return Finding("channel", cut.violations, cut.explained, cut.fill, chance / math.log(10))


def _inside(zeros: Zeros, rows: np.ndarray, channels: np.ndarray) -> int:
    """Count the nonzeros in rows and channels that are kept."""
    counts = zeros.counts
    if not counts.rows[~rows].any() and not counts.channels[~channels].any():
        return counts.nnz
    columns = np.repeat(channels, counts.taps)
    return int(np.count_nonzero(zeros.mask[rows][:, columns]))


def _log_chance(null: Null, nonzeros: np.ndarray, kept: np.ndarray, cells: int) -> float:
    dropped = nonzeros[~kept]
    if not len(dropped):
        return 0.0
    most = int(dropped.max())
    expected = len(nonzeros) * float(null.held(cells)[: most + 1].sum())
    # Two kinds of parts. Half of what is allowed goes to the limit 0, half to all others together.
    return log_at_least(len(dropped), expected) + math.log(2 * 2 * (cells if most else 1))
