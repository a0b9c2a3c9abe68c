"""What the cost model's events cost on a machine, solved for from measured kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..profile import SparsityProfile
from ..schedules.base import Config
from ..schedules.lookup import DENSE_FORMATS, template_named
from ..schedules.x86.cost import PRICE_NAMES, Events, cycles, prices_of
from ..targets import X86Machine
from ..workload import Workload

# What no processor goes below that issues two multiply-adds and two loads a cycle. They keep the
# fit from explaining one kernel's noise by another one's price.
FLOORS: Mapping[str, float] = {
    "fma": 0.5,
    "nonzero": 0.3,
    "load": 0.2,
    "far_load": 0.2,
    "loop": 3.0,
    "surprise": 5.0,
    "mask": 0.5,
    "lone_fma": 0.5,
    "slice": 5.0,
    "dense_fma": 1.0,
    "channel_fma": 1.0,
    "gemv_fma": 0.5,
    "pack": 1.0,
    "copy": 1.0,
    "store": 1.0,
    "write": 0.7,
    "unit": 20.0,
}
_LOWEST = 0.1
# Nothing costs this many times what the table says.
_CEILING = 20.0

# A price that is off by all of it counts as much as a kernel that is off by this share: the prices
# at hand decide what the measurements leave open, and everything where there are none.
_PULL = 0.2
# Rounds of reweighting: what is further off than most counts less, be it a disturbed measurement or
# a kernel that the events do not describe.
_ROUNDS = 5


@dataclass(frozen=True)
class Sample:
    """One measured kernel.

    Attributes
    ----------
    template : str
        Name of the kernel template.
    workload : Workload
        What it computes.
    events : mapping of str to float
        How often it does each thing that has a price; see `events_of`.
    microseconds : float
        What a call takes on one thread.
    group : str
        Names the shape of the layer: what is left out together.
    density : float
        Share of nonzeros in the weight; 1 for kernels that multiply by zeros.
    """

    template: str
    workload: Workload
    events: Events
    microseconds: float
    group: str
    density: float = 1.0

    @property
    def is_dense(self) -> bool:
        """Whether the kernel multiplies by zeros."""
        return template_named(self.template).format in DENSE_FORMATS


@dataclass(frozen=True)
class Errors:
    """How far estimates are off for shapes that the prices were not fitted to.

    Attributes
    ----------
    samples : tuple of Sample
        What was estimated.
    relative : tuple of float
        Estimate over measurement, less one, of each sample.
    best : mapping of (str, float) to float
        By group and density: how far the estimate of the kernel that is expected to be the fastest
        is from the time of the one that was. Dense kernels compete at every density, as in a plan;
        at density 1 they are alone.
    """

    samples: tuple[Sample, ...]
    relative: tuple[float, ...]
    best: Mapping[tuple[str, float], float]

    @property
    def median(self) -> float:
        """Median error over all samples, without its sign."""
        return _median(self.relative)

    @property
    def median_best(self) -> float:
        """Median error of the best kernel's time, without its sign."""
        return _median(self.best.values())

    def by_template(self) -> dict[str, float]:
        """Return the median error of each template's samples."""
        names = sorted({sample.template for sample in self.samples})
        pairs = list(zip(self.samples, self.relative, strict=True))
        return {name: _median(off for s, off in pairs if s.template == name) for name in names}


def events_of(
    template: str, workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count what a kernel does, in the events that have prices."""
    return template_named(template).events(workload, machine, profile, config)


def fit_prices(samples: Sequence[Sample], machine: X86Machine) -> dict[str, float]:
    """Find the prices that explain measured kernels best, in relative errors.

    Bounded least squares with a pull towards the prices at hand, reweighted so that outliers count
    less (Cauchy's weights: P. W. Holland, R. E. Welsch, "Robust regression using iteratively
    reweighted least-squares", Communications in Statistics A6, 1977).

    Parameters
    ----------
    samples : sequence of Sample
        Measured on one thread of the machine; the fewer, the more stays as it is.
    machine : X86Machine
        Its `gigahertz` turns the times into cycles, and its prices are those at hand.

    Returns
    -------
    dict of str to float
        Cycles of every event that has a price.
    """
    from scipy.optimize import lsq_linear

    start, low, high = _bounds(machine)
    rows = _shares(samples, machine)
    pull = _PULL * np.diag(1 / start)
    found = start
    weights = np.ones(len(samples))
    for _ in range(_ROUNDS):
        left = np.vstack([rows * weights[:, None], pull])
        right = np.concatenate([weights, np.full(len(start), _PULL)])
        found = lsq_linear(left, right, bounds=(low, high)).x
        weights = _trust(rows @ found - 1)
    return dict(zip(PRICE_NAMES, map(float, found), strict=True))


def leave_one_group_out(samples: Sequence[Sample], machine: X86Machine) -> Errors:
    """Estimate the kernels of every shape by prices that were fitted to the other shapes."""
    estimates = np.zeros(len(samples))
    for group in dict.fromkeys(sample.group for sample in samples):
        others = [sample for sample in samples if sample.group != group]
        fitted = replace(machine, prices=tuple(fit_prices(others, machine).items()))
        for index, sample in enumerate(samples):
            if sample.group == group:
                estimates[index] = estimate(sample, fitted)
    return errors_of(samples, estimates.tolist())


def estimate(sample: Sample, machine: X86Machine) -> float:
    """Return the microseconds that a machine's prices make of a sample's events."""
    return cycles(sample.events, machine) / (machine.gigahertz * 1e3)


def errors_of(samples: Sequence[Sample], estimates: Sequence[float]) -> Errors:
    """Hold estimates in microseconds against what was measured."""
    pairs = list(zip(samples, estimates, strict=True))
    relative = tuple(us / sample.microseconds - 1 for sample, us in pairs)
    best = {}
    for group, density in dict.fromkeys((s.group, s.density) for s in samples):
        rivals = [
            (us, s.microseconds)
            for s, us in pairs
            if s.group == group and (s.density == density or s.is_dense)
        ]
        best[group, density] = min(rivals)[0] / min(measured for _, measured in rivals) - 1
    return Errors(tuple(samples), relative, best)


def _bounds(machine: X86Machine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the prices at hand, and the lowest and highest that are believed."""
    prices = prices_of(machine)
    low = np.array([FLOORS.get(name, _LOWEST) for name in PRICE_NAMES])
    start = np.maximum([getattr(prices, name) for name in PRICE_NAMES], low)
    return start, low, _CEILING * start


def _shares(samples: Sequence[Sample], machine: X86Machine) -> np.ndarray:
    """Return each sample's events over its measured cycles: times the prices, they sum up to 1."""
    rows = [
        [sample.events.get(name, 0.0) / (sample.microseconds * machine.gigahertz * 1e3)
         for name in PRICE_NAMES]
        for sample in samples
    ]  # fmt: skip
    return np.array(rows).reshape(len(samples), len(PRICE_NAMES))


def _trust(residuals: np.ndarray) -> np.ndarray:
    """Return the roots of Cauchy's weights; what is typical is taken from the residuals."""
    if not len(residuals):
        return residuals
    # Noise of a per cent is always there: samples that are made up have none.
    scale = max(1.4826 * float(np.median(np.abs(residuals))), 0.01)
    return np.asarray(1 / np.sqrt(1 + (residuals / (2.385 * scale)) ** 2))


def _median(errors: Iterable[float]) -> float:
    found = list(errors)
    return float(np.median(np.abs(found))) if found else 0.0
