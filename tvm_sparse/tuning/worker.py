"""The process that builds and runs candidates: what goes wrong in it costs a candidate only.

    python -m tvm_sparse.tuning.worker

Reads a command a line from standard input, and writes an answer a line to standard output, both
JSON. Commands: ``open`` (a job's folder), ``measure`` (a kernel and its configuration), ``race``
(several of them against each other). The last two may name a tracker that lends a machine for that
one command; a line ``{"status": "borrowed"}`` then comes before the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SparseError, last_line
from .job import Job
from .trial import (
    Bench,
    DeviceLostError,
    LentDevice,
    LocalDevice,
    NoDeviceError,
    Prepared,
    WrongResultError,
    quartiles,
    race,
)

# Candidates that stay built, the last ones used.
_KEPT = 12


class Worker:
    """Answers commands about one job at a time.

    Parameters
    ----------
    say : callable
        Sends an answer.
    """

    def __init__(self, say: Callable[[Mapping[str, Any]], None]) -> None:
        self.say = say
        self.bench: Bench | None = None
        self.built: dict[str, Prepared] = {}

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        started = time.perf_counter()
        try:
            found = getattr(self, f"_{command['do']}")(command)
        except WrongResultError as error:
            found = {"status": "wrong", "message": str(error)}
        except NoDeviceError as error:
            found = {"status": "no device", "message": str(error)}
        except DeviceLostError as error:
            found = {"status": "lost", "message": str(error)}
        except (SparseError, KeyError, TypeError, ValueError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [""]
            found = {"status": "failed", "message": f"{type(error).__name__}: {lines[-1]}"}
        return {**found, "seconds": time.perf_counter() - started}

    def _open(self, command: Mapping[str, Any]) -> dict[str, Any]:
        self.built.clear()
        self.bench = Bench(Job.load(Path(command["folder"])))
        return {"status": "ok"}

    def _measure(self, command: Mapping[str, Any]) -> dict[str, Any]:
        with self._device(command.get("tracker")) as bench:
            prepared = self._prepared(bench, command["kernel"], command["config"])
            samples = bench.time(prepared, command["seconds"])
            return {"status": "ok", "error_share": prepared.error_share, **_summary(samples)}

    def _race(self, command: Mapping[str, Any]) -> dict[str, Any]:
        candidates = command["candidates"]
        with self._device(command.get("tracker")) as bench:
            runners = [self._prepared(bench, c["kernel"], c["config"]) for c in candidates]
            for runner in runners:
                bench.time(runner, 0)
            samples = race(bench, runners, command["seconds"])
            return {"status": "ok", "times": [_summary(s) for s in samples]}

    @contextmanager
    def _device(self, tracker: Mapping[str, Any] | None) -> Iterator[Bench]:
        """Choose the device: this process, or a machine lent for this one command."""
        bench = self.bench
        assert bench is not None
        if tracker is None:
            if bench.device is None:
                bench.use(LocalDevice(bench.kind))
            yield bench
            return
        self.built.clear()
        try:
            device = LentDevice(**tracker, kind=bench.kind)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise NoDeviceError(last_line(error)) from error
        self.say({"status": "borrowed"})
        try:
            bench.use(device)
            yield bench
        finally:
            self.built.clear()
            bench.give_back()

    def _prepared(self, bench: Bench, kernel: str, config: Mapping[str, Any]) -> Prepared:
        key = json.dumps([kernel, config], sort_keys=True)
        found = self.built.pop(key, None)
        if found is None:
            found = bench.prepare(kernel, config)
        self.built[key] = found
        while len(self.built) > _KEPT:
            self.built.pop(next(iter(self.built)))
        return found


def _summary(samples: list[float]) -> dict[str, Any]:
    low, median, high = quartiles(samples)
    return {"us": median, "low_us": low, "high_us": high, "samples": len(samples)}


def main() -> None:
    """Answer until standard input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    worker = Worker(say)
    for line in sys.stdin:
        say(worker.answer(json.loads(line)))


if __name__ == "__main__":
    main()
