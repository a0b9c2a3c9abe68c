"""Which of many ranked things go: exact counts, ties drawn at random."""

from __future__ import annotations

import numpy as np

# The rank of what is zero already: it goes before everything else, at no loss.
DEAD = -1.0


def lowest(ranks: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Mark the `count` lowest of a vector, and everything dead beyond that."""
    if count <= 0:
        return np.zeros(ranks.shape, bool)
    border = np.partition(ranks, count - 1)[count - 1]
    cut = ranks < border
    if border == DEAD:
        return ranks == DEAD
    ties = np.flatnonzero(ranks == border)
    missing = count - int(np.count_nonzero(cut))
    cut[ties if missing == ties.size else rng.permutation(ties)[:missing]] = True
    return cut


def lowest_share(ranks: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Mark the ``round(share * size)`` lowest of a vector."""
    return lowest(ranks, round(share * ranks.size), rng)


def lowest_of_size(
    ranks: np.ndarray, sizes: np.ndarray, target: int, rng: np.random.Generator
) -> np.ndarray:
    """Mark the lowest things whose sizes together come nearest to `target`, and all dead ones."""
    cut = ranks == DEAD
    if target <= 0 or not ranks.size:
        return cut
    shuffled = rng.permutation(ranks.size)
    order = shuffled[np.argsort(ranks[shuffled], kind="stable")]
    reached = np.concatenate([[0], np.cumsum(sizes[order])])
    cut[order[: int(np.argmin(np.abs(reached - target)))]] = True
    return cut


def outside_n_of_m(ranks: np.ndarray, n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Mark all but the `n` highest in every group of `m` along axis 1 of a 3-D array."""
    rows, channels, taps = ranks.shape
    groups = -(-channels // m)
    # Below every rank, so that padding never takes a place.
    padded = np.full((rows, groups * m, taps), 2 * DEAD, ranks.dtype)
    padded[:, :channels] = ranks
    grouped = padded.reshape(rows, groups, m, taps)
    order = rng.permutation(m)
    ranked = np.argsort(grouped[:, :, order], axis=2, kind="stable")
    cut = np.ones(grouped.shape, bool)
    np.put_along_axis(cut, order[ranked[:, :, m - n :]], False, axis=2)
    return cut.reshape(padded.shape)[:, :channels]
