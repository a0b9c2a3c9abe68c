"""What tuning came to: a table for people, the records and a report for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..progress import format_seconds
from ..records import TuningRecord
from ..report import Report

_LONGEST_NAME = 34
_HEADINGS = ("layer", "shape", "zeros", "trials", "dense us", "untuned us", "tuned us", "kernel")


@dataclass(frozen=True)
class TaskResult:
    """One workload that layers share, and the fastest kernel that was found.

    Attributes
    ----------
    layers : tuple of str
        The layers that it stands for.
    shape : str
        Their shape in a few characters.
    density : float
        Share of nonzeros of the first one.
    kernel : str
        The winner with its configuration.
    us, untuned_us, dense_us : float or None
        Microseconds of the winner, of what the plan would have taken without records, and of the
        best dense kernel; None where that failed.
    trials, failures : int
        Candidates measured, and those that were wrong, crashed or hung.
    reused : int
        Trials whose records were there already.
    noisy : bool
        Whether the winner's times were spread widely.
    history : tuple of (int, float)
        The fastest time after each trial.
    """

    layers: tuple[str, ...]
    shape: str
    density: float
    kernel: str
    us: float | None
    untuned_us: float | None
    dense_us: float | None
    trials: int
    failures: int
    reused: int
    noisy: bool
    history: tuple[tuple[int, float], ...]

    @property
    def weight(self) -> float:
        """Microseconds that its layers take together once tuned."""
        return len(self.layers) * (self.us or 0.0)


@dataclass(frozen=True)
class TuningResult:
    """All tasks of a model.

    Attributes
    ----------
    tasks : tuple of TaskResult
        The one that takes longest first.
    records : tuple of TuningRecord
        What was measured, this time and before.
    report : Report
        The layers as a plan with these records has them.
    seconds : float
        What it took.
    notes : tuple of str
        What else a reader should know.
    """

    tasks: tuple[TaskResult, ...]
    records: tuple[TuningRecord, ...]
    report: Report
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def tuned_us(self) -> float:
        """All layers together with the kernels found."""
        return sum(len(t.layers) * (t.us or 0.0) for t in self._complete)

    @property
    def untuned_us(self) -> float:
        """The same layers with the kernels of the plan without records."""
        return sum(len(t.layers) * (t.untuned_us or 0.0) for t in self._complete)

    @property
    def _complete(self) -> list[TaskResult]:
        return [t for t in self.tasks if t.us is not None and t.untuned_us is not None]

    def __str__(self) -> str:
        rows = [_HEADINGS]
        for task in self.tasks:
            rows.append(
                (
                    _name(task.layers),
                    task.shape,
                    f"{100 * (1 - task.density):.0f}%",
                    str(task.trials),
                    _us(task.dense_us),
                    _us(task.untuned_us),
                    _us(task.us) + ("~" if task.noisy else ""),
                    task.kernel,
                )
            )
        lines = _table(rows)
        new = sum(t.trials - t.reused for t in self.tasks)
        kept = sum(t.reused for t in self.tasks)
        failed = sum(t.failures for t in self.tasks)
        again = f", {kept} taken from the file" if kept else ""
        bad = f", {failed} failed" if failed else ""
        lines.append(f"{new} trials{again}{bad}, {format_seconds(self.seconds)}")
        if self.tuned_us:
            lines.append(
                f"all layers: {_time(self.untuned_us)} as planned, {_time(self.tuned_us)} tuned "
                f"({self.untuned_us / self.tuned_us:.2f}x)"
            )
        if any(task.noisy for task in self.tasks):
            lines.append("~ noisy: the middle half of the times spans more than a tenth")
        return "\n".join([*lines, *self.notes])


def _name(layers: Sequence[str]) -> str:
    more = f" +{len(layers) - 1}" if len(layers) > 1 else ""
    room = _LONGEST_NAME - len(more)
    name = layers[0] if len(layers[0]) <= room else f"...{layers[0][3 - room :]}"
    return name + more


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1000 else f"{us:.1f} us"


def _us(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = range(2, 7)
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
