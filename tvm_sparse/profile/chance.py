"""How probable it is that nonzeros which fell at random look like a form.

The null hypothesis everywhere: `nnz` nonzeros on cells of a matrix, drawn without replacement. The
nonzeros of disjoint parts are then negatively associated, and so are indicators of parts that are
all increasing, or all decreasing, functions of them ("this one is empty", "this one has more than
n"). For sums of such indicators the bounds of Chernoff hold as if they were independent.

References
----------
Joag-Dev and Proschan, "Negative association of random variables", Annals of Statistics 11 (1983):
2.11 for permutation distributions, property 6 for functions of disjoint parts.
Dubhashi and Ranjan, "Balls and bins: a study in negative dependence", Random Structures and
Algorithms 13 (1998), proposition 5: Chernoff's bounds hold under negative association.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# An expectation that underflows is as good as this one, and has a logarithm.
_LEAST = 1e-300


@dataclass(frozen=True)
class Null:
    """A matrix of `size` cells on which `nnz` nonzeros fell."""

    size: int
    nnz: int

    @property
    def zeros(self) -> int:
        """Cells without a nonzero."""
        return self.size - self.nnz

    def held(self, cells: int) -> np.ndarray:
        """Return the probabilities that a part of `cells` holds 0, 1, ... `cells` nonzeros.

        Hypergeometric, by the ratio of neighbours from the smallest number that is possible on.
        """
        least, most = max(0, cells - self.zeros), min(cells, self.nnz)
        k = np.arange(least, most, dtype=np.float64)
        ratios = (self.nnz - k) * (cells - k) / ((k + 1) * (self.zeros - cells + k + 1))
        first = (
            log_choose(self.nnz, least)
            + log_choose(self.zeros, cells - least)
            - log_choose(self.size, cells)
        )
        chances = np.zeros(cells + 1)
        chances[least : most + 1] = np.exp(first + np.concatenate([[0], np.cumsum(np.log(ratios))]))
        return chances

    def log_empty(self, cells: int) -> float:
        """Return the log probability that a part of `cells` holds no nonzero."""
        if cells > self.zeros:
            return -math.inf
        return log_choose(self.size - cells, self.nnz) - log_choose(self.size, self.nnz)


def log_choose(n: int, k: int) -> float:
    """Return the logarithm of a binomial coefficient."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def log_at_least(found: float, expected: float) -> float:
    """Bound the log probability that `found` or more hold where `expected` would."""
    if found <= expected or not found:
        return 0.0
    return _chernoff(found, max(expected, _LEAST))


def log_at_most(found: float, expected: float) -> float:
    """Bound the log probability that `found` or fewer hold where `expected` would."""
    if found >= expected:
        return 0.0
    return _chernoff(found, expected) if found else -expected


def _chernoff(found: float, expected: float) -> float:
    return -(found * math.log(found / expected) - found + expected)
