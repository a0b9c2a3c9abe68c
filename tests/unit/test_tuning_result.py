"""What tuning shows: a table when it is done, and on a terminal one while it runs."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tvm_sparse.progress import SILENT, Progress
from tvm_sparse.report import Report
from tvm_sparse.tuning import live as live_module
from tvm_sparse.tuning.live import Live, Row
from tvm_sparse.tuning.result import TaskResult, TuningResult

TASK = TaskResult(
    layers=("encoder.0.dense",),
    shape="768x768x128",
    density=0.1,
    kernel="sliced_rows mr=4 nt=4 kb=128",
    us=50.0,
    untuned_us=75.5,
    dense_us=612.4,
    trials=24,
    failures=0,
    reused=0,
    noisy=False,
    history=((1, 75.5), (7, 50.0)),
)


def result_of(*tasks: TaskResult, seconds: float = 75.0, notes: Sequence[str] = ()) -> TuningResult:
    return TuningResult(tasks, (), Report("model.onnx"), seconds, tuple(notes))


# The table.


def lines_of(*tasks: TaskResult) -> list[str]:
    return str(result_of(*tasks)).splitlines()


def cells_of(task: TaskResult) -> dict[str, str]:
    headings, row = (re.split(" {2,}", line) for line in lines_of(task)[:2])
    return dict(zip(headings, row, strict=True))


def test_a_row_has_the_layer_its_zeros_trials_times_and_kernel() -> None:
    assert cells_of(TASK) == {
        "layer": "encoder.0.dense",
        "shape": "768x768x128",
        "zeros": "90%",
        "trials": "24",
        "dense us": "612",
        "untuned us": "75.5",
        "tuned us": "50.0",
        "kernel": "sliced_rows mr=4 nt=4 kb=128",
    }


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        (("fc",), "fc"),
        (("fc", "fc2"), "fc +1"),
        (("fc", "a", "b", "c"), "fc +3"),
        (("x" * 34,), "x" * 34),
        (("x" * 35 + "y",), "..." + "x" * 30 + "y"),
        (("x" * 40 + "y",) * 4, "..." + "x" * 27 + "y +3"),
        (("x" * 40 + "y",) * 12, "..." + "x" * 26 + "y +11"),
    ],
)
def test_names_are_shortened_from_the_left_and_count_the_layers_that_share_the_kernel(
    layers: tuple[str, ...], shown: str
) -> None:
    assert cells_of(replace(TASK, layers=layers))["layer"] == shown
    assert len(shown) <= 34


@pytest.mark.parametrize(
    ("us", "shown"),
    [(0.04, "0.0"), (7.26, "7.3"), (99.94, "99.9"), (100.4, "100"), (12345.6, "12346"),
     (None, "-"), (math.inf, "-"), (math.nan, "-")],
)  # fmt: skip
def test_times_are_as_long_as_they_are_exact_and_missing_ones_a_dash(
    us: float | None, shown: str
) -> None:
    cells = cells_of(replace(TASK, dense_us=us, untuned_us=us, us=us))
    assert {cells[name] for name in ("dense us", "untuned us", "tuned us")} == {shown}


def test_a_noisy_time_is_marked_and_the_mark_explained() -> None:
    noisy = lines_of(TASK, replace(TASK, noisy=True))
    assert " 50.0~  sliced_rows" in noisy[2] and " 50.0  sliced_rows" in noisy[1]
    assert noisy[-1] == "~ noisy: the middle half of the times spans more than a tenth"
    assert "~" not in str(result_of(TASK))


def test_columns_are_aligned_and_no_line_ends_in_spaces() -> None:
    short = replace(TASK, layers=("fc",), shape="5x7x3", us=1.0, untuned_us=None, kernel="gemv")
    rows = lines_of(TASK, short)[:3]
    places = {row.index(kernel) for row, kernel in
              zip(rows, ("kernel", "sliced_rows", "gemv"), strict=True)}  # fmt: skip
    assert len(places) == 1
    assert all(line == line.rstrip() for line in lines_of(TASK, short))


def test_the_tasks_stand_in_their_order() -> None:
    tasks = [replace(TASK, layers=(name,)) for name in ("b", "a", "c")]
    assert [line[0] for line in lines_of(*tasks)[1:4]] == ["b", "a", "c"]


def test_trials_are_counted_with_those_from_the_file_and_those_that_failed() -> None:
    assert "24 trials, 1:15" in lines_of(TASK)
    again = replace(TASK, trials=30, reused=24, failures=2)
    assert "30 trials, 24 taken from the file, 2 failed, 1:15" in lines_of(TASK, again)


def test_the_totals_count_every_layer_of_a_task() -> None:
    several = replace(TASK, layers=("a", "b", "c"), us=1000.0, untuned_us=2000.0)
    result = result_of(TASK, several)
    assert result.tuned_us == 50.0 + 3 * 1000.0
    assert result.untuned_us == 75.5 + 3 * 2000.0
    assert "all layers: 6.08 ms as planned, 3.05 ms tuned (1.99x)" in str(result)
    assert "all layers: 75.5 us as planned, 50.0 us tuned (1.51x)" in lines_of(TASK)
    assert several.weight == 3000.0


@pytest.mark.parametrize("missing", ["us", "untuned_us"])
def test_the_totals_leave_out_layers_of_which_one_side_is_missing(missing: str) -> None:
    other = replace(TASK, **{missing: None})
    assert result_of(TASK, other).tuned_us == 50.0
    assert result_of(TASK, other).untuned_us == 75.5
    assert "all layers" not in str(result_of(other))
    assert replace(TASK, us=None).weight == 0.0


def test_notes_stand_last_and_nothing_at_all_is_still_a_table() -> None:
    text = str(result_of(notes=("line 3 of 'r.jsonl' is torn and was skipped",), seconds=0.2))
    assert text.splitlines()[0].split()[:2] == ["layer", "shape"]
    assert text.splitlines()[1:] == [
        "0 trials, 0:00",
        "line 3 of 'r.jsonl' is torn and was skipped",
    ]


# While it runs.

ROWS = [
    Row("encoder.0.dense", 50.04, 612.0, 12, 64, False),
    Row("pooler", 8.0, None, 16, 64, True),
    Row("classifier", None, None, 0, 20, False),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(live_module, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make a terminal that is wide enough."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    return Terminal()


def drawn(
    terminal: Terminal,
    clock: Clock,
    rows: Callable[[], Sequence[Row]],
    change: Callable[[], None] = lambda: None,
) -> str:
    """Return what is on the terminal last, after 90 seconds."""
    pytest.importorskip("rich")
    with redirect_stderr(terminal), Live(rows, Progress()) as live:
        change()
        live.step("encoder.0.dense")
        clock.now += 90
    return terminal.getvalue()


def shown_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()
            if "│" in line]  # fmt: skip


def test_a_terminal_gets_a_row_a_task_those_in_work_first(terminal: Terminal, clock: Clock) -> None:
    assert shown_rows(drawn(terminal, clock, lambda: ROWS))[-3:] == [
        ["encoder.0.dense", "50.0", "12.2x", "12", ""],
        ["classifier", "", "", "0", ""],
        ["pooler", "8.0", "", "16", "done"],
    ]


def test_the_title_has_the_trials_and_the_time_that_is_left_at_most(
    terminal: Terminal, clock: Clock
) -> None:
    rows = [replace(row, trials=0) for row in ROWS]

    def measure() -> None:
        rows[0] = replace(rows[0], trials=10)
        rows[1] = replace(rows[1], trials=20)

    text = " ".join(drawn(terminal, clock, lambda: rows, measure).split())
    # 54 + 20 trials are left of what is not done, at 3 seconds a trial.
    assert "30 trials, 1:30 elapsed, at most 3:42 left" in text


def test_before_the_first_trial_nobody_knows_how_long_it_takes(
    terminal: Terminal, clock: Clock
) -> None:
    text = drawn(terminal, clock, lambda: [replace(ROWS[2], trials=0)])
    assert "0 trials, 1:30" in text and "left" not in text


def test_trials_from_the_file_took_no_time(terminal: Terminal, clock: Clock) -> None:
    rows = [replace(ROWS[0], trials=40)]

    def measure() -> None:
        rows[0] = replace(rows[0], trials=43)

    text = " ".join(drawn(terminal, clock, lambda: rows, measure).split())
    # 21 are left, at 30 seconds each.
    assert "43 trials, 1:30 elapsed, at most 10:30 left" in text


def test_of_many_tasks_the_others_are_counted(terminal: Terminal, clock: Clock) -> None:
    text = drawn(terminal, clock, lambda: [replace(ROWS[0], name=f"fc{i}") for i in range(30)])
    shown = shown_rows(text)
    assert shown[-1][0] == "and 6 more"
    assert sum(cells[0].startswith("fc") for cells in shown[-25:]) == 24


@pytest.mark.parametrize("name", ["blocks[fc].weight", "a[/b]", "[red]fc", "x\\[y]"])
def test_a_name_with_brackets_is_shown_as_it_is(
    name: str, terminal: Terminal, clock: Clock
) -> None:
    text = drawn(terminal, clock, lambda: [replace(ROWS[0], name=name)])
    assert shown_rows(text)[-1][0] == name


def test_the_table_is_wiped_when_tuning_is_stopped(terminal: Terminal, clock: Clock) -> None:
    pytest.importorskip("rich")
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, redirect_stderr(terminal), Live(lambda: ROWS, Progress()):
        raise KeyboardInterrupt
    shown, _, wiped = terminal.getvalue().rpartition("pooler")
    # Up and erase, for every line; and the cursor is shown again.
    assert wiped.count("\x1b[1A\x1b[2K") >= len(ROWS)
    assert shown.count("\x1b[?25l") == 1 and "\x1b[?25h" in terminal.getvalue()


def test_without_rich_a_terminal_gets_one_line(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "_has_rich", lambda: False)
    progress = Progress(delay=0.0)
    with redirect_stderr(terminal), Live(lambda: ROWS, progress) as live:
        live.step("encoder.0.dense")
        live.step("classifier")
        progress.draw()
        line = terminal.getvalue().rpartition("\x1b[K")[2]
    # 52 + 20 are left of the tasks that are not done.
    assert line.startswith("tune  [") and "2/72" in line and line.endswith("classifier")
    assert terminal.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("has_rich", [True, False])
def test_what_is_no_terminal_gets_nothing(
    has_rich: bool, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(live_module, "_has_rich", lambda: has_rich)
    with redirect_stderr(stream), Live(lambda: ROWS, Progress(delay=0.0)) as live:
        live.step("pooler")
        clock.now += 90
    assert stream.getvalue() == ""


@pytest.mark.parametrize("has_rich", [True, False])
def test_silence_is_kept_on_a_terminal_too(
    has_rich: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "_has_rich", lambda: has_rich)
    with redirect_stderr(terminal), Live(lambda: ROWS, SILENT) as live:
        live.step("pooler")
    assert terminal.getvalue() == ""
