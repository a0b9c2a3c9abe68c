"""Tile-wise pruning: whole output features first, then input columns tile by tile.

C. Guo et al., "Accelerating Sparse DNN Models without Hardware-Support via Tile-Wise Sparsity",
SC 2020 (arXiv 2008.13006). The output features of all layers are ranked together, and the lowest
go; the survivors are regrouped in tiles of G, and the inputs of all tiles are ranked together. What
is left is irregular as a whole and dense in every tile. Both steps cut in stages, so that the ranks
of a stage no longer count what earlier ones have cut.

Two things are this package's own: each stage takes the same share in both steps, and the last
stage alone decides what is zero (a feature that changes its tile gets its weights back).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .selection import DEAD, lowest, lowest_of_size

STAGES = 4


@dataclass(frozen=True)
class TileCut:
    """What goes of one matrix.

    Attributes
    ----------
    kept : numpy.ndarray of int
        Output features that are left, ascending; consecutive ones share a tile.
    cut : numpy.ndarray of bool
        [rows, columns].
    """

    kept: np.ndarray
    cut: np.ndarray


def cut_tile_wise(
    scores: Sequence[np.ndarray],
    dead: Sequence[np.ndarray],
    tile: int,
    share: float,
    restored: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Mark the elements that go from matrices that are ranked together.

    Parameters
    ----------
    scores, dead : sequence of numpy.ndarray
        [rows, columns] of each layer: scores of the elements, and which are zero already.
    tile : int
        Output features in a tile.
    share : float
        Share of the elements to cut, what is restored already taken off.
    restored : float
        Share of the cut elements that comes back, the most important ones (the paper's TEW).
    """
    cuts = tile_cuts(scores, dead, tile, min(share / (1.0 - restored), 1.0), rng)
    masks = [cut.cut for cut in cuts]
    if restored == 0 or not masks:
        return masks
    total = sum(mask.size for mask in masks)
    removed = np.concatenate(
        [
            np.where(gone, DEAD, score)[mask]
            for score, gone, mask in zip(scores, dead, masks, strict=True)
        ]
    )
    still = lowest(removed, min(removed.size, round(share * total)), rng)
    ends = np.cumsum([np.count_nonzero(mask) for mask in masks])
    result = []
    for mask, part in zip(masks, np.split(still, ends[:-1]), strict=True):
        left = np.zeros(mask.shape, bool)
        left[mask] = part
        result.append(left)
    return result


def tile_cuts(
    scores: Sequence[np.ndarray],
    dead: Sequence[np.ndarray],
    tile: int,
    share: float,
    rng: np.random.Generator,
    stages: int = STAGES,
) -> list[TileCut]:
    """Cut in stages of growing sparsity, without restoring anything."""
    squares = [np.square(s, dtype=np.float64) for s in scores]
    gone = [np.array(d) for d in dead]
    cuts = [TileCut(np.arange(d.shape[0]), np.zeros(d.shape, bool)) for d in dead]
    for stage in range(1, stages + 1):
        cuts = _stage(squares, gone, tile, share * stage / stages, rng)
        gone = [start | cut.cut for start, cut in zip(dead, cuts, strict=True)]
    return cuts


def _stage(
    squares: Sequence[np.ndarray],
    gone: Sequence[np.ndarray],
    tile: int,
    share: float,
    rng: np.random.Generator,
) -> list[TileCut]:
    total = sum(s.size for s in squares)
    feature_share = 1.0 - math.sqrt(1.0 - share)
    kept = _keep_features(squares, gone, round(feature_share * total), rng)
    whole = sum(s.size - k.size * s.shape[1] for s, k in zip(squares, kept, strict=True))
    starts = [np.arange(0, k.size, tile) for k in kept]
    ranks = [
        _rank_tiles(s, g, k, start)
        for s, g, k, start in zip(squares, gone, kept, starts, strict=True)
    ]
    heights = [np.diff(start, append=k.size) for start, k in zip(starts, kept, strict=True)]
    sizes = [np.repeat(h, s.shape[1]) for h, s in zip(heights, squares, strict=True)]
    units = lowest_of_size(_join(ranks), _join(sizes), round(share * total) - whole, rng)
    cuts = []
    parts = np.split(units, np.cumsum([rank.size for rank in ranks])[:-1])
    for s, k, h, rank, part in zip(squares, kept, heights, ranks, parts, strict=True):
        cut = np.ones(s.shape, bool)
        cut[k] = np.repeat(part.reshape(rank.shape), h, axis=0)
        cuts.append(TileCut(k, cut))
    return cuts


def _keep_features(
    squares: Sequence[np.ndarray],
    gone: Sequence[np.ndarray],
    target: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    ranks = [
        np.where(g.all(axis=1), DEAD, _mean(np.where(g, 0, s), 1))
        for s, g in zip(squares, gone, strict=True)
    ]
    sizes = [np.full(s.shape[0], s.shape[1]) for s in squares]
    cut = lowest_of_size(_join(ranks), _join(sizes), target, rng)
    parts = np.split(cut, np.cumsum([rank.size for rank in ranks])[:-1])
    return [np.flatnonzero(~part) for part in parts]


def _rank_tiles(
    squares: np.ndarray, gone: np.ndarray, kept: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Rank every column of every tile: [tiles, columns]."""
    if not kept.size or not squares.shape[1]:
        return np.zeros((starts.size, squares.shape[1]))
    sums = np.add.reduceat(np.where(gone, 0, squares)[kept], starts, 0)
    alive = np.add.reduceat((~gone[kept]).astype(np.int64), starts, 0)
    heights = np.diff(starts, append=kept.size)
    return np.where(alive == 0, DEAD, sums / heights[:, None])


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    return values.sum(axis=axis) / max(values.shape[axis], 1)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.ravel() for part in parts] or [np.zeros(0)])
