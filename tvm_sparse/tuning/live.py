"""What tuning shows while it runs: a table on a terminal that rich can draw, else a line."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..progress import Phase, Progress, format_seconds

_MOST_ROWS = 24


@dataclass(frozen=True)
class Row:
    """One task as the table shows it."""

    name: str
    best_us: float | None
    dense_us: float | None
    trials: int
    planned: int
    done: bool


class Live:
    """Shows tasks until it is closed; nothing where nobody looks.

    Parameters
    ----------
    rows : callable
        Gives the tasks as they are.
    progress : Progress
        Draws the line where there is no table; a silent one silences the table too.
    """

    def __init__(self, rows: Callable[[], Sequence[Row]], progress: Progress) -> None:
        self._rows, self._progress = rows, progress
        self._started = time.monotonic()
        # Trials that records brought along took no time.
        self._before = 0
        self._live: Any = None
        self._phase: Phase | None = None

    def __enter__(self) -> Live:
        self._before = sum(row.trials for row in self._rows())
        if self._progress.enabled and sys.stderr.isatty() and _has_rich():
            from rich.console import Console
            from rich.live import Live as RichLive

            console = Console(file=sys.stderr)
            self._live = RichLive(get_renderable=self._table, console=console, transient=True)
            self._live.__enter__()
        else:
            total = sum(_left(row) for row in self._rows())
            self._phase = self._progress.phase("tune", total=total)
            self._phase.__enter__()
            self._phase.step()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for part in (self._live, self._phase):
            if part is not None:
                part.__exit__(kind, error, trace)

    def step(self, label: str) -> None:
        """Say that a trial ended."""
        if self._phase is not None:
            self._phase.step(label)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        rows = list(self._rows())
        table = Table(title=self._title(rows), title_justify="left")
        for heading in ("layer", "best us", "of dense", "trials", ""):
            table.add_column(heading, justify="left" if heading in ("layer", "") else "right")
        # The tasks in work, then the others.
        shown = sorted(rows, key=lambda row: (row.done, -row.trials))[:_MOST_ROWS]
        for row in shown:
            # Names may hold what rich would take for its markup.
            table.add_row(*(Text(cell) for cell in _cells(row)))
        if len(rows) > len(shown):
            table.add_row(f"and {len(rows) - len(shown)} more")
        return table

    def _title(self, rows: Sequence[Row]) -> str:
        elapsed = time.monotonic() - self._started
        trials = sum(row.trials for row in rows)
        done, left = trials - self._before, sum(_left(row) for row in rows)
        text = f"{trials} trials, {format_seconds(elapsed)} elapsed"
        return f"{text}, at most {format_seconds(elapsed / done * left)} left" if done else text


def _left(row: Row) -> int:
    return 0 if row.done else max(0, row.planned - row.trials)


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    best = "" if row.best_us is None else f"{row.best_us:.1f}"
    ratio = f"{row.dense_us / row.best_us:.1f}x" if row.best_us and row.dense_us else ""
    return row.name, best, ratio, str(row.trials), "done" if row.done else ""


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None
