"""Progress: drawn on terminals only, only when work lasts, and wiped whatever happens."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tvm_sparse.progress import SILENT, Progress, format_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")


def test_short_work_draws_nothing() -> None:
    terminal = Terminal()
    with Progress(terminal).phase("load", total=2) as phase:
        phase.step("a")
        phase.step("b")
    assert terminal.getvalue() == ""


def test_long_work_shows_bar_counts_times_and_item() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with progress.phase("compile kernels", total=4) as phase:
        phase.step("conv1")
        clock.now += 65
        phase.step("conv2")
        progress.draw()
        line = terminal.getvalue()
    assert "compile kernels" in line
    assert "[######------------------] 1/4" in line
    assert "1:05 elapsed, 3:15 left" in line
    assert line.endswith("conv2")


def test_without_a_total_there_is_a_count_and_no_bar() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with progress.phase("tune") as phase:
        phase.step("a")
        phase.step("b")
        clock.now += 3
        progress.draw()
        line = terminal.getvalue()
    assert "1 done, 0:03 elapsed" in line
    assert "[" not in line.replace("\x1b[K", "")


def test_more_steps_than_announced_stay_within_the_bar() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with progress.phase("p", total=1) as phase:
        for _ in range(5):
            phase.step()
        clock.now += 2
        progress.draw()
    assert "1/1" in terminal.getvalue()


def test_the_clock_runs_while_one_item_takes_long() -> None:
    terminal = Terminal()
    with Progress(terminal, delay=0.0).phase("compile", total=1) as phase:
        phase.step("the only one")
        deadline = time.monotonic() + 10
        while "the only one" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "the only one" in terminal.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_line_is_wiped_when_work_is_stopped(error: type[BaseException]) -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with pytest.raises(error), progress.phase("tune", total=2):
        clock.now += 5
        progress.draw()
        raise error
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_line_never_exceeds_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with progress.phase("compile kernels", total=2) as phase:
        phase.step("a layer with a very long name " * 5)
        clock.now += 2
        progress.draw()
        drawn = terminal.getvalue().replace("\r\x1b[K", "\n").splitlines()
    assert max(map(len, drawn)) < 40


def test_an_inner_phase_is_shown_in_place_of_the_outer() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with progress.phase("outer", total=2) as outer:
        outer.step()
        clock.now += 2
        progress.draw()
        with progress.phase("inner", total=3):
            progress.draw()
        assert terminal.getvalue().rsplit("\x1b[K", 1)[1].startswith("inner")
        progress.draw()
        assert terminal.getvalue().rsplit("\x1b[K", 1)[1].startswith("outer")


@pytest.mark.parametrize(
    "stream", [io.StringIO(), Terminal()], ids=["no terminal", "dumb terminal"]
)
def test_other_streams_get_nothing(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    progress = Progress(stream, delay=0.0)
    with progress.phase("p", total=1) as phase:
        phase.step()
        progress.draw()
    assert stream.getvalue() == ""


def test_silent_is_a_usable_default() -> None:
    with SILENT.phase("p", total=3) as phase:
        phase.step("a")
    assert phase.begun == 1


def test_a_terminal_that_went_away_does_not_stop_the_work() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(terminal, clock=clock)
    with progress.phase("p", total=2) as phase:
        phase.step()
        clock.now += 2
        terminal.close()
        progress.draw()
        phase.step()
    assert phase.begun == 2


def test_standard_error_that_is_a_pipe_stays_empty() -> None:
    code = (
        "import time\nfrom tvm_sparse.progress import Progress\n"
        "with Progress(delay=0.0).phase('p', total=1) as p:\n    p.step('x'); time.sleep(0.5)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == "" and result.stdout == ""


def test_ctrl_c_on_a_real_terminal_leaves_no_line_behind() -> None:
    # A run in the background ignores Ctrl-C, and its children inherit that.
    code = (
        "import signal, time\nfrom tvm_sparse.progress import Progress\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    with Progress(delay=0.0).phase('tune', total=9) as p:\n"
        "        p.step('conv1'); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    shown = b""
    while b"conv1" not in shown:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the other end closes when the process ends
        while b"stopped" not in shown:
            shown += os.read(ours, 4096)
    assert process.wait(timeout=30) == 0, shown.decode()
    os.close(ours)
    assert shown.split(b"stopped")[0].endswith(b"\r\x1b[K")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
