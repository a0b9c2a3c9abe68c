"""How sparsity grows while a model is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..errors import SparseError


class Schedule(Protocol):
    """What gives the sparsity of every step."""

    def at(self, step: int) -> float:
        """Return the share of zeros to have at `step`."""
        ...


@dataclass(frozen=True)
class OneShot:
    """All at once, from the step `start` on."""

    sparsity: float
    start: int = 0

    def __post_init__(self) -> None:
        _check(self.sparsity, 1)

    def at(self, step: int) -> float:
        """Return the share of zeros to have at `step`."""
        return self.sparsity if step >= self.start else 0.0


@dataclass(frozen=True)
class CubicSchedule:
    """Fast at first, when there is much to cut, and slow at the end.

    M. Zhu and S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017 (arXiv 1710.01878): over `steps` steps from `start` on the sparsity grows
    from `initial` to `sparsity`, as ``sparsity + (initial - sparsity) * (1 - t / steps)**3``.
    """

    sparsity: float
    steps: int
    start: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check(self.sparsity, self.steps)
        _check(self.initial, self.steps)

    def at(self, step: int) -> float:
        """Return the share of zeros to have at `step`; before `start` it is `initial`."""
        done = min(max((step - self.start) / self.steps, 0.0), 1.0)
        return self.sparsity + (self.initial - self.sparsity) * (1.0 - done) ** 3


def _check(sparsity: float, steps: int) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise SparseError(
            f"the sparsity is the share of zeros, from 0 to below 1; {sparsity:g} is outside"
        )
    if steps < 1:
        raise SparseError(f"a schedule takes at least one step, and {steps} were given")
