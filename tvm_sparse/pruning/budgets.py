"""How much of each layer goes: the scopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ..errors import SparseError
from .patterns import Pattern

Scope = Literal["global", "layer", "erk", "row"]
SCOPES: tuple[Scope, ...] = ("global", "layer", "erk", "row")

DEFAULT_SPARSITY = 0.9


def share_of(pattern: Pattern, text: str, sparsity: float | None) -> float:
    """Return the share of zeros to reach.

    Raises
    ------
    SparseError
        When `sparsity` is out of its range, or not the one that the pattern fixes.
    """
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise SparseError(
            f"the sparsity is the share of zeros, from 0 to below 1; {sparsity:g} is outside"
        )
    if pattern.implied is None:
        share = DEFAULT_SPARSITY if sparsity is None else sparsity
        if pattern.restored and not share / (1.0 - pattern.restored) < 1.0:
            raise SparseError(
                f"pattern {text} gives {pattern.restored:.4g} of what it cuts back, so a sparsity "
                f"of {share:g} cannot be reached; restore less"
            )
        return share
    if sparsity is not None and not math.isclose(sparsity, pattern.implied, abs_tol=1e-6):
        raise SparseError(
            f"pattern {text} leaves {pattern.implied:.4g} zero by itself, so a sparsity of "
            f"{sparsity:g} cannot be reached; leave it out"
        )
    return pattern.implied


def check_scope(scope: str | None, pattern: Pattern, text: str, scores: str) -> Scope:
    """Return the scope, and the one that suits the scores where none was given.

    Raises
    ------
    SparseError
        When it is unknown, or makes no sense for the pattern.
    """
    has_rows = pattern.kind in ("unstructured", "block", "kernel")
    if scope is None and scores == "wanda":
        # Norms of activations differ from layer to layer; Wanda compares within an output.
        return "row" if has_rows else "layer"
    for known in SCOPES:
        if (scope or "global") == known:
            if known == "row" and not has_rows and pattern.implied is None:
                raise SparseError(
                    f"scope 'row' ranks inside an output row, and {text} cuts across rows"
                )
            return known
    raise SparseError(f"unknown scope '{scope}'; there are global, layer, erk and row")


def erk_densities(dims: Sequence[tuple[int, ...]], density: float) -> list[float]:
    """Spread a density over layers after their dimensions: Erdos-Renyi-Kernel.

    A layer's density is proportional to (sum of its dimensions) / (product of its dimensions);
    layers that would get more than 1 stay dense, and the others give that much more. From U. Evci
    et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020.

    Parameters
    ----------
    dims : sequence of tuple of int
        Output channels, input channels and kernel axes of every layer.
    density : float
        Share of all elements that stays.

    Returns
    -------
    list of float
        Densities, from 0 to 1; weighed by the layers' sizes they add up to `density` of all
        elements.
    """
    sizes = [math.prod(shape) for shape in dims]
    dense = {index for index, size in enumerate(sizes) if size == 0}
    while True:
        left = [index for index in range(len(dims)) if index not in dense]
        budget = density * sum(sizes) - sum(sizes[index] for index in dense)
        total = sum(sum(dims[index]) for index in left)
        scale = budget / total if total else 0.0
        wanted = {index: scale * sum(dims[index]) / sizes[index] for index in left}
        over = {index for index, value in wanted.items() if value > 1.0}
        if not over:
            return [wanted.get(index, 1.0) for index in range(len(dims))]
        dense |= over
