"""Progress of long work: one line on a terminal, and nothing at all anywhere else."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

BAR_WIDTH = 24
REDRAW_SECONDS = 0.2
_CLEAR_LINE = "\r\x1b[K"


def _is_terminal(stream: TextIO) -> bool:
    if os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def format_seconds(seconds: float) -> str:
    """Write a duration as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Phase:
    """A stretch of work with a known or unknown number of items; made by `Progress.phase`."""

    def __init__(self, owner: Progress, title: str, total: int | None) -> None:
        self._owner = owner
        self.title = title
        self.total = total
        self.begun = 0
        self.label = ""
        self.started = owner.clock()

    @property
    def done(self) -> int:
        """Items that are finished: all that were begun but the one in work."""
        return max(self.begun - 1, 0)

    def step(self, label: str = "") -> None:
        """Begin the next item; the one begun before it now counts as done."""
        self.begun += 1
        self.label = label

    def __enter__(self) -> Phase:
        self._owner._open(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner._close(self)

    def describe(self, now: float) -> str:
        """Write the bar, the counts, the times and the item in work as one line.

        Parameters
        ----------
        now : float
            Seconds of the owner's clock.
        """
        elapsed = now - self.started
        if not self.total:
            count = f"{self.done} done, " if self.begun else ""
            return f"{self.title}  {count}{format_seconds(elapsed)} elapsed  {self.label}".rstrip()
        done = min(self.done, self.total)
        filled = BAR_WIDTH * done // self.total
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        times = f"{format_seconds(elapsed)} elapsed"
        if done:
            times += f", {format_seconds(elapsed / done * (self.total - done))} left"
        return f"{self.title}  [{bar}] {done}/{self.total}  {times}  {self.label}".rstrip()


class Progress:
    """Show how far long work has come, on a terminal only, and only when it lasts.

    Phases may be nested; the innermost is shown. The line is redrawn by a thread, so that the
    clock also runs while one item takes long, and it is wiped when its phase ends, however that
    ends (Ctrl-C too).

    Parameters
    ----------
    stream : text stream, optional
        Where to draw; standard error as it is when a phase begins. A stream that is no terminal
        gets nothing.
    enabled : bool
        False draws nothing anywhere: the default of library functions (see `SILENT`).
    delay : float
        Seconds that a phase must last before it is drawn.
    clock : callable
        Seconds, never running backwards.

    Examples
    --------
    >>> with Progress().phase("compile kernels", total=2) as phase:
    ...     for name in ("conv1", "conv2"):
    ...         phase.step(name)
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        delay: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self.delay = delay
        self.clock = clock
        self._stream = stream
        self._phases: list[Phase] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawn = False

    def phase(self, title: str, total: int | None = None) -> Phase:
        """Begin a phase; use it in a ``with`` statement.

        Parameters
        ----------
        title : str
            What is being done, for example ``"compile kernels"``.
        total : int, optional
            How many times `Phase.step` will be called; without it there is a count, but no bar.
        """
        return Phase(self, title, total)

    def draw(self) -> None:
        """Draw the innermost phase now, if it has lasted long enough."""
        with self._lock:
            if not self._phases:
                return
            phase, now = self._phases[-1], self.clock()
            # An outer phase on the screen is replaced at once, or it would seem to stand still.
            if now - phase.started < self.delay and not self._drawn:
                return
            width = shutil.get_terminal_size().columns - 1
            self._drawn = self._write(_CLEAR_LINE + phase.describe(now)[:width])

    def _write(self, text: str) -> bool:
        stream = self._stream or sys.stderr
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            # A terminal that went away must not stop the work.
            self.enabled = False
            return False
        return True

    def _open(self, phase: Phase) -> None:
        phase.started = self.clock()
        if not self.enabled or not _is_terminal(self._stream or sys.stderr):
            return
        with self._lock:
            self._phases.append(phase)
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._redraw, name="progress", daemon=True)
            self._thread.start()

    def _close(self, phase: Phase) -> None:
        with self._lock:
            if phase not in self._phases:
                return
            del self._phases[self._phases.index(phase) :]
            if self._phases:
                return
            thread, self._thread = self._thread, None
            self._stop.set()
            if self._drawn:
                self._write(_CLEAR_LINE)
                self._drawn = False
        if thread is not None:
            thread.join()

    def _redraw(self) -> None:
        while not self._stop.wait(REDRAW_SECONDS):
            self.draw()


SILENT = Progress(enabled=False)
