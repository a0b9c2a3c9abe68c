"""Many threads and hostile clients, for a moment here and for long with `-m slow`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from package_support import ROOT


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import soak

        yield soak
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def library(soak: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = soak.export(tmp_path_factory.mktemp("soak"))
    return path


def check_calls(found: dict[str, Any]) -> None:
    assert found["wrong"] == 0
    grown = found["last_bytes"] - found["first_bytes"]
    assert grown < 32 << 20, f"memory grew by {grown} bytes: {found['samples']}"


def check_server(found: dict[str, Any]) -> None:
    assert found["wrong"] == found["tracebacks"] == found["exit_code"] == 0
    assert found["answers_afterwards"]
    assert set(found["statuses"]) <= {"200", "503"} and set(found["burst"]) <= {"200", "503"}
    for when in ("last", "after_burst"):
        grown = found[f"{when}_bytes"] - found["first_bytes"]
        assert grown < 128 << 20, f"memory grew by {grown} bytes: {found['samples']}"


@pytest.mark.filterwarnings("ignore:the module asks for 2 threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_hundreds_of_calls_from_eight_threads(soak: Any, library: Path, threads: int) -> None:
    check_calls(soak.soak_threads(library, calls=400, callers=8, threads=threads, instances=4))


@pytest.mark.slow
@pytest.mark.parametrize("instances", [None, 8])
def test_a_hundred_thousand_calls_from_eight_threads(
    soak: Any, library: Path, instances: int | None
) -> None:
    check_calls(soak.soak_threads(library, 100_000, 8, threads=1, instances=instances))


def test_hundreds_of_requests_among_attacks(soak: Any, library: Path) -> None:
    check_server(soak.soak_server(library, 200, len(soak.ATTACKS), 8, "--max-batch", "32"))


@pytest.mark.slow
def test_thousands_of_requests_among_attacks(soak: Any, library: Path) -> None:
    check_server(soak.soak_server(library, 10_000, 2_500, 8))


def test_the_tables_say_what_was_counted(soak: Any) -> None:
    memory = soak.spread([100 << 20] * 3 + [120 << 20] * 7)
    case = {"callers": 8, "threads": 1, "instances": 2, "calls": 100_000, "wrong": 0, **memory}
    assert "| 8 | 1 | 2 | 100,000 | 0 | " in soak.threads_table([case])
    assert memory["last_bytes"] == 120 << 20
    assert soak.counts(soak.by_status(soak.Counter({0: 2, 400: 1000}))) == "closed: 2, 400: 1,000"
