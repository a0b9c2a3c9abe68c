"""From scores to masks: what is cut of which weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .budgets import Scope, erk_densities
from .patterns import Pattern
from .selection import lowest_share
from .tile_wise import cut_tile_wise
from .units import cut_n_of_m, cut_rows, elements, rank_units


@dataclass(frozen=True)
class Scored:
    """A weight with the scores of its elements, both [output rows, input channels, taps].

    `dims` are output and input channels and the kernel's axes.
    """

    view: np.ndarray
    scores: np.ndarray
    dims: tuple[int, ...]

    @property
    def dead(self) -> np.ndarray:
        """Elements that are zero already; -0.0 is zero, NaN is not."""
        return self.view == 0


def cut_masks(
    weights: Sequence[Scored],
    pattern: Pattern,
    share: float,
    scope: Scope,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Mark the elements of each weight that go; see the package's text for what each scope means.

    Returns
    -------
    list of numpy.ndarray of bool
        Of the shapes of the weights.
    """
    if pattern.implied is not None:
        return [cut_n_of_m(w.scores, w.dead, pattern, rng) for w in weights]
    if scope == "row":
        ranks = [rank_units(w.scores, w.dead, pattern) for w in weights]
        cuts = [cut_rows(rank, share, rng) for rank in ranks]
        return [elements(c, w.view.shape, pattern) for w, c in zip(weights, cuts, strict=True)]
    if scope == "global":
        return _cut_together(weights, pattern, share, rng)
    shares = [share] * len(weights)
    if scope == "erk":
        shares = [1.0 - d for d in erk_densities([w.dims for w in weights], 1.0 - share)]
    pairs = zip(weights, shares, strict=True)
    return [_cut_together([weight], pattern, alone, rng)[0] for weight, alone in pairs]


def _cut_together(
    weights: Sequence[Scored], pattern: Pattern, share: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Cut the lowest units of several weights."""
    if pattern.kind == "tile-wise":
        shapes = [w.view.shape for w in weights]
        masks = cut_tile_wise(
            [w.scores.reshape(w.view.shape[0], math.prod(w.view.shape[1:])) for w in weights],
            [w.dead.reshape(w.view.shape[0], math.prod(w.view.shape[1:])) for w in weights],
            pattern.size[0],
            share,
            pattern.restored,
            rng,
        )
        return [mask.reshape(shape) for mask, shape in zip(masks, shapes, strict=True)]
    ranks = [rank_units(w.scores, w.dead, pattern) for w in weights]
    together = np.concatenate([rank.ravel() for rank in ranks] or [np.zeros(0)])
    cut = lowest_share(together, share, rng)
    parts = np.split(cut, np.cumsum([rank.size for rank in ranks])[:-1])
    return [
        elements(part.reshape(rank.shape), weight.view.shape, pattern)
        for weight, rank, part in zip(weights, ranks, parts, strict=False)
    ]
