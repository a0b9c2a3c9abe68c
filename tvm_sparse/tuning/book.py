"""Records looked up for a layer: its own, or those of the layer that is most like it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import RecordFile, Statistics, Subject, TuningRecord, code_digest
from ..workload import Conv2dGeometry, Geometry, MatmulGeometry, Workload

# Layers further apart than this tell nothing about each other: about e^0.7, twice the size.
_FURTHEST = 0.7
# How much the spread of nonzeros over rows and columns counts beside sizes and density.
_SPREAD_WEIGHT = 0.5


@dataclass(frozen=True)
class Hint:
    """The fastest kernel of a similar layer.

    Attributes
    ----------
    distance : float
        0 for a layer of the same shape and statistics.
    trusted : bool
        Whether it was measured on this machine, with the kernels as they are now.
    """

    record: TuningRecord
    distance: float
    trusted: bool

    def describe(self) -> str:
        """Name the layer that was measured."""
        statistics = self.record.subject.statistics
        zeros = 100 * (1 - statistics.density)
        shape = describe_geometry(self.record.subject.workload.geometry)
        where = "" if self.trusted else ", on another machine or by an older version"
        return f"{shape} with {zeros:.0f} % zeros{where}"


class RecordBook:
    """Records as plans use them.

    Parameters
    ----------
    file : RecordFile
        What was read.
    target : mapping
        What is planned for: times of other targets are no times.
    machine : str or None
        The machine that is planned for; None where it is not this one, so that any that has the
        target will do.
    tvm : str
        Version of TVM that compiles.
    """

    def __init__(
        self, file: RecordFile, target: Mapping[str, Any], machine: str | None, tvm: str
    ) -> None:
        self.target, self.machine, self.tvm = dict(target), machine, tvm
        subjects: dict[str, Subject] = {}
        latest: dict[str, dict[str, TuningRecord]] = defaultdict(dict)
        for record in file.records:
            key = record.subject.key
            subjects[key] = record.subject
            # What was measured again, at more length, comes later in the file.
            latest[key].pop(record.key, None)
            latest[key][record.key] = record
        self._subjects = [(subjects[key], tuple(latest[key].values())) for key in subjects]

    def measured(self, workload: Workload, digest: str) -> list[TuningRecord]:
        """Return what was measured of exactly this layer, on this machine, by these kernels."""
        found: dict[tuple[str, str], TuningRecord] = {}
        for subject, records in self._subjects:
            if digest in subject.weights and subject.workload == workload and self.trusts(subject):
                for record in records:
                    found[record.kernel, str(sorted(record.config.items()))] = record
        return [record for record in found.values() if record.ok]

    def trusts(self, subject: Subject) -> bool:
        """Whether times of a subject hold for what is planned."""
        return (
            dict(subject.target) == self.target
            and (self.machine is None or subject.machine == self.machine)
            and subject.code == code_digest()
            and subject.tvm == self.tvm
        )

    def similar(self, workload: Workload, statistics: Statistics) -> list[Hint]:
        """Return the winners of layers like this one: trusted ones first, then the nearest."""
        hints = []
        for subject, records in self._subjects:
            if subject.target.get("kind") != self.target.get("kind"):
                # Kernels for GPUs are none for processors, nor the other way round.
                continue
            distance = _distance(subject, workload, statistics)
            fit = [record for record in records if record.ok]
            if distance <= _FURTHEST and fit:
                best = min(fit, key=lambda record: record.us or math.inf)
                hints.append(Hint(best, distance, self.trusts(subject)))
        return sorted(hints, key=lambda hint: (not hint.trusted, hint.distance))


def history_of(records: Sequence[TuningRecord]) -> tuple[tuple[int, float], ...]:
    """Return the fastest time so far after every trial."""
    first: dict[int, TuningRecord] = {}
    for record in records:
        first.setdefault(record.trial, record)
    points: list[tuple[int, float]] = []
    best = math.inf
    for trial in sorted(first):
        best = min(best, first[trial].us or math.inf)
        if best < math.inf:
            points.append((trial, round(best, 3)))
    return tuple(points)


def describe_geometry(geometry: Geometry | None) -> str:
    """Write a layer's shape in a few characters."""
    if isinstance(geometry, MatmulGeometry):
        tokens = "n" if geometry.n is None else geometry.n
        return f"{geometry.m}x{geometry.k}x{tokens}"
    assert geometry is not None
    g = geometry
    stride = f"/{g.strides[0]}" if g.strides != (1, 1) else ""
    groups = f" in {g.groups} groups" if g.groups > 1 else ""
    batch = "" if g.batch == 1 else f" b{'n' if g.batch is None else g.batch}"
    return (
        f"{g.kernel[0]}x{g.kernel[1]}{stride} {g.in_channels}->{g.out_channels}"
        f"@{g.in_height}x{g.in_width}{groups}{batch}"
    )


def _distance(subject: Subject, workload: Workload, statistics: Statistics) -> float:
    """Compare two layers: sizes and densities by their ratios, spreads by their difference."""
    other = subject.workload
    sizes, others = _sizes(workload.geometry), _sizes(other.geometry)
    if (
        (workload.op, workload.dtype, workload.threads) != (other.op, other.dtype, other.threads)
        or sizes is None
        or others is None
        or sizes[0] != others[0]
    ):
        return math.inf
    ratios = [abs(math.log(a / b)) for a, b in zip(sizes[1], others[1], strict=True)]
    mine, theirs = statistics, subject.statistics
    densities = [max(s.density, 1e-4) for s in (mine, theirs)]
    ratios.append(abs(math.log(densities[0] / densities[1])))
    spread = abs(mine.row_cv - theirs.row_cv) + abs(mine.column_cv - theirs.column_cv)
    return sum(ratios) + _SPREAD_WEIGHT * spread


def _sizes(geometry: Geometry | None) -> tuple[tuple[Any, ...], tuple[int, ...]] | None:
    """Return what must be equal of two layers, and what should be about the same."""
    if isinstance(geometry, MatmulGeometry):
        if geometry.n is None:
            return ("symbolic", geometry.layout), (geometry.m, geometry.k)
        return (geometry.layout,), (geometry.m, geometry.k, geometry.n)
    if isinstance(geometry, Conv2dGeometry):
        g = geometry
        depthwise = g.groups if not g.is_depthwise else "depthwise"
        fixed = (g.kernel, g.strides, g.dilation, depthwise, g.batch is None)
        return fixed, (g.out_channels, g.in_channels, max(1, g.pixels), g.batch or 1)
    return None
