"""N:M, for any M up to 16: at most N of every M neighbours are nonzero.

A sample of the rows tells for every M how many nonzeros its groups have; only an N that hardly any
group exceeds, where many would by chance, is counted in the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..findings import Finding
from .chance import Null, log_at_most
from .counts import fold, row_chunks
from .data import NM_PATTERNS
from .parts import CHANCE, EXPLAINED, NEAR
from .zeros import Zeros

LARGEST = 16
_SAMPLED_CELLS = 1 << 16
# Groups of the sample that may have too many nonzeros, for each nonzero that they may have, and
# against what chance would give.
_HINT_BROKEN, _HINT_RATIO = 1.5 * NEAR, 0.5
# Of the nonzeros that N:M allows, a weight has so many where it holds exactly; where it nearly
# holds, EXPLAINED. Without, 3:4 would be claimed of what is nearly 2:4. Forms that hardware knows
# need no such share: they hold of a 2:4 weight that was pruned further, too.
_FILLED = 0.75
# Numbers N and M, and both directions.
_TRIES = 2 * sum(range(1, LARGEST))


@dataclass(frozen=True)
class Grouping:
    """At most `n` of every `m` neighbours, along "columns" or "channels"."""

    n: int
    m: int
    along: str


@dataclass(frozen=True)
class Tally:
    """Groups with too many nonzeros, and how many are too many."""

    groups: int
    nonzeros: int


def group_finding(zeros: Zeros) -> Finding | None:
    """Return the N:M that holds, or nearly does, and is the least likely by chance.

    That is 1:2 rather than 2:4 where both hold; and of a 2:4 weight with a few nonzeros more, 2:4,
    which nearly holds, rather than 6:8, which does.
    """
    for grouping in _candidates(zeros):
        finding = _judge(zeros, grouping)
        if finding:
            return finding
    return None


def sampled_shares(zeros: Zeros, along: str, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """Return for sizes M, from a sample, the shares of groups with more than 0, 1, ... nonzeros."""
    lines = _sample(zeros, along)
    sums = np.zeros((lines.shape[0], lines.shape[1] + 1), np.int32)
    np.cumsum(lines, axis=1, out=sums[:, 1:])
    shares: dict[int, np.ndarray] = {}
    for m in sizes:
        ends = sums[:, ::m]
        if ends.shape[1] > 1:
            held = np.bincount(np.diff(ends).reshape(-1), minlength=m + 1)
            shares[m] = 1 - np.cumsum(held) / held.sum()
    return shares


def _sample(zeros: Zeros, along: str) -> np.ndarray:
    """Take some rows, or some rows' lines of channels at each tap."""
    rows, columns = zeros.counts.shape
    count = min(rows, max(1, _SAMPLED_CELLS // columns))
    chosen = zeros.weight[np.linspace(0, rows - 1, count).astype(np.int64)] != 0
    if along == "columns":
        return chosen
    taps = zeros.counts.taps
    return chosen.reshape(count, -1, taps).transpose(0, 2, 1).reshape(count * taps, -1)


def _candidates(zeros: Zeros) -> list[Grouping]:
    """List what may hold, the least likely first as far as a sample can tell."""
    broken = {Grouping(fit.n, fit.m, fit.along): 0.0 for fit in zeros.counts.nm if fit.holds}
    for along in ("columns", "channels")[: 1 + (zeros.counts.taps > 1)]:
        for m, shares in sampled_shares(zeros, along, range(2, LARGEST + 1)).items():
            n = int(np.argmax(shares <= _HINT_BROKEN * np.arange(m + 1)))
            grouping = Grouping(n, m, along)
            if 0 < n < m and _is_hint(zeros, grouping, float(shares[n])):
                broken[grouping] = float(shares[n]) * zeros.counts.size / m
    chances = {grouping: _log_chance(zeros, grouping, most) for grouping, most in broken.items()}
    return sorted(chances, key=lambda grouping: (chances[grouping], grouping.m))


def _is_hint(zeros: Zeros, grouping: Grouping, broken: float) -> bool:
    counts = zeros.counts
    by_chance = float(Null(counts.size, counts.nnz).held(grouping.m)[grouping.n + 1 :].sum())
    enough = by_chance * counts.size / grouping.m >= -math.log(CHANCE)
    filled = counts.nnz >= _FILLED * allowed(zeros, grouping)
    return enough and filled and broken <= _HINT_RATIO * by_chance


def _lines(zeros: Zeros, along: str) -> tuple[int, int]:
    """Return how many lines there are to cut into groups, and how long they are."""
    (rows, columns), taps = zeros.counts.shape, zeros.counts.taps
    return (rows, columns) if along == "columns" else (rows * taps, columns // taps)


def allowed(zeros: Zeros, grouping: Grouping) -> int:
    """Count the nonzeros that a weight may have."""
    lines, length = _lines(zeros, grouping.along)
    whole, rest = divmod(length, grouping.m)
    return lines * (whole * grouping.n + min(rest, grouping.n))


def _judge(zeros: Zeros, grouping: Grouping) -> Finding | None:
    counts = zeros.counts
    places = allowed(zeros, grouping)
    tally = _count(zeros, grouping)
    fill = (counts.nnz - tally.nonzeros) / places
    known = not tally.nonzeros and (grouping.n, grouping.m) in NM_PATTERNS
    least = 0.0 if known else _FILLED if not tally.nonzeros else EXPLAINED
    if fill < least or tally.nonzeros > NEAR * counts.nnz:
        return None
    chance = _log_chance(zeros, grouping, tally.groups) + math.log(_TRIES)
    if chance > math.log(CHANCE):
        return None
    explained = min(1.0, (counts.size - places - tally.nonzeros) / (counts.size - counts.nnz))
    return Finding(
        f"{grouping.n}:{grouping.m}",
        tally.nonzeros,
        explained,
        fill,
        chance / math.log(10),
        along=grouping.along,
    )


def _count(zeros: Zeros, grouping: Grouping) -> Tally:
    groups = nonzeros = 0
    for chunk in row_chunks(zeros.weight):
        lines = chunk
        if grouping.along == "channels":
            lines = chunk.reshape(len(chunk), -1, zeros.counts.taps)
        held = fold(lines, grouping.m, 1)
        broken = held[held > grouping.n]
        groups += broken.size
        nonzeros += int(broken.sum(dtype=np.int64)) - grouping.n * broken.size
    return Tally(groups, nonzeros)


def _log_chance(zeros: Zeros, grouping: Grouping, broken: float) -> float:
    """Bound the log probability that so few groups have too many nonzeros, whatever the columns.

    "This one has too many" is increasing, so indicators are negatively associated. That none has is
    at most as probable as the product says.

    Columns that differ in scale may lie so that groups hold by luck. Hence the larger of two
    bounds: nonzeros fell anywhere, or they fell anywhere within their own columns, of which those
    of a group are independent.
    """
    return max(
        _log_chance_of(zeros.counts.shape[0], broken, chances)
        for chances in (_anywhere(zeros, grouping), _within_columns(zeros, grouping))
    )


def _log_chance_of(rows: int, broken: float, chances: np.ndarray) -> float:
    """Do it for the chances that the groups of a row have too many."""
    if broken:
        return log_at_most(broken, rows * float(chances.sum()))
    if np.any(chances >= 1):
        return -math.inf
    # Counted from those that break it, which are rare: 1 minus that loses no digits.
    return rows * float(np.log1p(-chances).sum())


def _anywhere(zeros: Zeros, grouping: Grouping) -> np.ndarray:
    null = Null(zeros.counts.size, zeros.counts.nnz)
    lines, length = _lines(zeros, grouping.along)
    lines //= zeros.counts.shape[0]
    whole, rest = divmod(length, grouping.m)
    sizes = [grouping.m] * whole + [rest] * (rest > 0)
    of_size = {cells: null.held(cells)[grouping.n + 1 :].sum() for cells in set(sizes)}
    return np.repeat([of_size[cells] for cells in sizes], lines)


def _within_columns(zeros: Zeros, grouping: Grouping) -> np.ndarray:
    """Return the tails of sums of independent indicators, one for each column of a group."""
    shares = zeros.counts.columns / zeros.counts.shape[0]
    if grouping.along == "channels":
        shares = shares.reshape(-1, zeros.counts.taps).T.reshape(-1)
    lines = shares.reshape(-1, _lines(zeros, grouping.along)[1])
    padded = np.zeros((len(lines), -(-lines.shape[1] // grouping.m) * grouping.m))
    padded[:, : lines.shape[1]] = lines
    held = np.zeros((grouping.m + 1, padded.size // grouping.m))
    held[0] = 1
    for share in padded.reshape(-1, grouping.m).T:
        held[1:] = held[1:] * (1 - share) + held[:-1] * share
        held[0] *= 1 - share
    return held[grouping.n + 1 :].sum(axis=0)
