"""The parent's side of measuring: worker processes that are watched, and restarted when they fail.

A candidate that crashes, hangs or is wrong costs itself only. On a fleet, a trial whose machine was
lost runs again elsewhere.
"""

from __future__ import annotations

import json
import os
import queue
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TuningError, last_line
from .job import Job

# Seconds after which a candidate is given up, and those that one is timed at most.
TRIAL_TIMEOUT = 40.0
_MEASURE_SECONDS = 0.25
_RACE_SECONDS = 1.5
# The folder that a process is started in must not hide the installed package from it.
_PROGRAM = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from tvm_sparse.tuning.worker import main; main()"
)
# Loading TVM takes seconds, on a busy machine many.
_START_TIMEOUT = 120.0
# A trial that loses its machine this often is blamed for it.
_ATTEMPTS = 3
_CONNECT_TIMEOUT = 5.0
# How long a machine is waited for; a server that hangs never comes.
_BORROW_TIMEOUT = 60.0


@dataclass(frozen=True)
class Candidate:
    """A kernel template at a configuration."""

    kernel: str
    config: Mapping[str, Any]

    @property
    def key(self) -> str:
        """What two equal candidates share."""
        return json.dumps([self.kernel, self.config], sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """What measuring a candidate gave; the fields are those of `TuningRecord`."""

    status: str
    us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples: int = 0
    error_share: float | None = None
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Fleet:
    """An RPC tracker, and the kind of machine to borrow from it."""

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, text: str) -> Fleet:
        """Read ``HOST:PORT/KEY``.

        Raises
        ------
        TuningError
            When it is something else.
        """
        address, slash, key = text.partition("/")
        host, colon, port = address.rpartition(":")
        is_port = port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16
        if not (host and colon and is_port and slash and key):
            raise TuningError(f"'{text}' is no tracker; write HOST:PORT and a key")
        return cls(host, int(port), key)

    def count(self) -> int:
        """Count the machines of the key.

        Raises
        ------
        TuningError
            When the tracker cannot be reached, or has none.
        """
        from tvm import rpc

        try:
            # TVM would go on trying for a minute.
            socket.create_connection((self.host, self.port), _CONNECT_TIMEOUT).close()
            summary = rpc.connect_tracker(self.host, self.port).summary()
        except (RuntimeError, OSError) as error:
            raise TuningError(
                f"the tracker {self.host}:{self.port} cannot be reached: {last_line(error)}"
            ) from None
        servers = [s for s in summary["server_info"] if s["key"] == f"server:{self.key}"]
        if not servers:
            keys = sorted({str(s["key"]).removeprefix("server:") for s in summary["server_info"]})
            known = f"it has {', '.join(keys)}" if keys else "it has no servers at all"
            where = f"the tracker {self.host}:{self.port}"
            raise TuningError(f"{where} has no server of the key '{self.key}'; {known}")
        return len(servers)

    def gpu(self) -> str:
        """Borrow a machine of the key, and name its GPU.

        Raises
        ------
        TuningError
            When none comes, or it has no GPU.
        """
        found: list[str | TuningError] = []

        def ask() -> None:
            from .trial import LentDevice

            try:
                device = LentDevice(self.host, self.port, self.key, _BORROW_TIMEOUT, 1, "cuda")
                found.append(str(device.device.device_name))
                device.close()
            except TuningError as error:
                found.append(error)
            except (RuntimeError, OSError, EOFError, ValueError) as error:
                found.append(TuningError(f"the machine that was lent fails: {last_line(error)}"))

        # TVM waits for a machine for as long as it takes.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_BORROW_TIMEOUT)
        if not found:
            raise TuningError(
                f"no machine of the key '{self.key}' came within {_BORROW_TIMEOUT:g} s"
            )
        if isinstance(found[0], TuningError):
            raise found[0]
        return found[0]


class _Count:
    """A number that threads share."""

    def __init__(self) -> None:
        self.value, self._lock = 0, threading.Lock()

    def up(self) -> None:
        """Count one more."""
        with self._lock:
            self.value += 1

    def reset(self) -> None:
        """Begin again."""
        with self._lock:
            self.value = 0


class _Silent(Exception):
    """A worker died or answers no more; the message says which."""


class _Process:
    """A worker process, started when it is first needed."""

    def __init__(self, program: Sequence[str], threads: int, cores: Sequence[int]) -> None:
        self.program, self.threads, self.cores = program, threads, cores
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._pending = b""
        self._errors: Any = None

    def ask(self, folder: Path, command: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a command about a job and wait for the answer."""
        if self._process is None:
            self._start()
        if self._folder != folder:
            self._open(folder)
        self._say(command)
        if "tracker" in command:
            answer = self._borrowed()
            if answer["status"] != "borrowed":
                return answer
        return self._hear(timeout)

    def _open(self, folder: Path) -> None:
        """Show a job to the worker; what fails here is no candidate's fault."""
        try:
            self._say({"do": "open", "folder": str(folder)})
            answer = self._hear(_START_TIMEOUT)
        except _Silent as silence:
            raise TuningError(
                f"the process that measures does not start ({silence}): {self._last_words()}"
            ) from None
        if answer["status"] != "ok":
            raise TuningError(f"the process that measures cannot begin: {answer['message']}")
        self._folder = folder

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"

    def _borrowed(self) -> dict[str, Any]:
        try:
            return self._hear(_BORROW_TIMEOUT)
        except _Silent:
            return {"status": "no device", "message": f"none came within {_BORROW_TIMEOUT:g} s"}

    def _start(self) -> None:
        environment = {
            **os.environ,
            "TVM_NUM_THREADS": str(self.threads),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._errors = tempfile.TemporaryFile()
        # The terminal's Ctrl-C is for the parent, which ends its workers itself.
        self._process = subprocess.Popen(
            list(self.program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._folder, self._pending = None, b""
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, self.cores)

    def _say(self, command: Mapping[str, Any]) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        except (OSError, ValueError):
            self.stop()
            raise _Silent("crashed") from None

    def _hear(self, timeout: float) -> dict[str, Any]:
        """Read the next answer."""
        end = time.monotonic() + timeout
        while b"\n" not in self._pending:
            data = self._read(end - time.monotonic())
            if not data:
                self.stop()
                raise _Silent("crashed" if data is not None else "timed out")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return dict(json.loads(line))

    def _read(self, timeout: float) -> bytes | None:
        """Read what is there; nothing when the process ended, None when the time is over."""
        try:
            assert self._process is not None and self._process.stdout is not None
            descriptor = self._process.stdout.fileno()
            ready, _, _ = select.select([descriptor], [], [], max(0.0, timeout))
            return os.read(descriptor, 1 << 16) if ready else None
        except (AssertionError, OSError, ValueError):
            # Another thread has ended the process meanwhile.
            return b""

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


class Measurer:
    """Measures candidates here, or on the machines of a fleet side by side.

    Parameters
    ----------
    threads : int
        Threads that kernels run on.
    fleet : Fleet, optional
        Where to measure; here by default.
    timeout : float
        Seconds after which a candidate is given up.
    program : sequence of str
        What a worker process runs.
    """

    def __init__(
        self,
        threads: int,
        fleet: Fleet | None = None,
        timeout: float = TRIAL_TIMEOUT,
        program: Sequence[str] = (sys.executable, "-c", _PROGRAM),
    ) -> None:
        self.threads, self.fleet, self.timeout = threads, fleet, timeout
        self.width = fleet.count() if fleet else 1
        cores = [] if fleet else _cores(threads)
        self._processes = [_Process(program, threads, cores) for _ in range(self.width)]

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.stop()

    def measure(
        self, folder: Path, candidates: Sequence[Candidate]
    ) -> Iterator[tuple[int, Outcome]]:
        """Measure candidates of a job; yield each outcome as it comes, with its index."""
        if self.fleet is None:
            for index, candidate in enumerate(candidates):
                yield index, self._try(self._processes[0], folder, candidate)
        else:
            yield from self._spread(folder, candidates)

    def race(self, folder: Path, candidates: Sequence[Candidate]) -> list[Outcome] | None:
        """Time candidates against each other on one machine; None when that did not work."""
        command = {
            "do": "race",
            "candidates": [{"kernel": c.kernel, "config": dict(c.config)} for c in candidates],
            "seconds": _RACE_SECONDS,
        }
        patience = self.timeout * len(candidates) + _RACE_SECONDS
        try:
            answer = self._ask(self._processes[0], folder, command, patience)
        except _Silent:
            return None
        if answer["status"] != "ok":
            return None
        return [Outcome("ok", **times) for times in answer["times"]]

    def _spread(
        self, folder: Path, candidates: Sequence[Candidate]
    ) -> Iterator[tuple[int, Outcome]]:
        """Let every worker take the next trial; give those of lost machines back."""
        waiting: queue.Queue[tuple[int, int]] = queue.Queue()
        finished: queue.Queue[tuple[int, Outcome] | TuningError] = queue.Queue()
        for index in range(len(candidates)):
            waiting.put((index, 1))
        done, without = threading.Event(), _Count()
        reasons: list[str] = []

        def work(process: _Process) -> None:
            while not done.is_set():
                try:
                    index, attempt = waiting.get(timeout=0.05)
                except queue.Empty:
                    continue
                try:
                    outcome = self._try(process, folder, candidates[index])
                except TuningError as error:
                    finished.put(error)
                    return
                if outcome.status == "no device":
                    reasons.append(outcome.message)
                    without.up()
                    waiting.put((index, attempt))
                elif outcome.status in ("lost", "timed out") and attempt < _ATTEMPTS:
                    waiting.put((index, attempt + 1))
                else:
                    without.reset()
                    finished.put((index, _blamed(outcome)))

        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in self._processes]
        for thread in threads:
            thread.start()
        left = len(candidates)
        try:
            while left:
                try:
                    found = finished.get(timeout=0.5)
                except queue.Empty:
                    self._give_up_without(without.value, reasons)
                    continue
                if isinstance(found, TuningError):
                    raise found
                yield found
                left -= 1
        finally:
            done.set()

    def _give_up_without(self, devices: int, reasons: Sequence[str]) -> None:
        if devices > 2 * self.width:
            assert self.fleet is not None
            raise TuningError(
                f"no machine of the key '{self.fleet.key}' answers any more ({reasons[-1]}); "
                "what was measured is kept"
            )

    def _try(self, process: _Process, folder: Path, candidate: Candidate) -> Outcome:
        command = {
            "do": "measure",
            "kernel": candidate.kernel,
            "config": dict(candidate.config),
            "seconds": _MEASURE_SECONDS,
        }
        try:
            answer = self._ask(process, folder, command, self.timeout)
        except _Silent as silence:
            message = {
                "crashed": "the process that ran it died",
                "timed out": f"nothing came back within {self.timeout:g} s",
            }[str(silence)]
            return Outcome(str(silence), message=message, seconds=self.timeout)
        return Outcome(**answer)

    def _ask(
        self, process: _Process, folder: Path, command: Mapping[str, Any], timeout: float
    ) -> dict[str, Any]:
        if self.fleet is not None:
            fleet = self.fleet
            tracker = {"host": fleet.host, "port": fleet.port, "key": fleet.key}
            command = {
                **command,
                "tracker": {**tracker, "seconds": timeout, "threads": self.threads},
            }
        return process.ask(folder, command, timeout)


def _blamed(outcome: Outcome) -> Outcome:
    """Say of a candidate that lost every machine that it crashed them."""
    return replace(outcome, status="crashed") if outcome.status == "lost" else outcome


def _cores(threads: int) -> list[int]:
    """Choose the cores to measure on: the last ones, since the first is the busiest."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[-threads:]


@contextmanager
def job_folder(job: Job) -> Iterator[Path]:
    """Keep a job where workers find it."""
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-tune-") as name:
        folder = Path(name)
        job.save(folder)
        yield folder
