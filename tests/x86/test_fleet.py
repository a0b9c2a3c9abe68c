"""Tuning on a fleet: a tracker and three servers on loopback, one of which dies or hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tuning_support import small_job, small_model

import tvm_sparse as ts
from tvm_sparse.cuda_toolkit import has_gpu
from tvm_sparse.errors import TuningError
from tvm_sparse.records import read_records
from tvm_sparse.targets import machine_of, resolve_target, target_data
from tvm_sparse.tuning.measurer import Candidate, Fleet, Measurer, job_folder

pytest.importorskip("tornado", reason="TVM's tracker needs tornado")

KEY = "box"
SERVERS = 3


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Machines:
    """The processes of a fleet."""

    port: int
    tracker: subprocess.Popen[bytes]
    servers: list[subprocess.Popen[bytes]]

    @property
    def fleet(self) -> Fleet:
        return Fleet("127.0.0.1", self.port, KEY)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}/{KEY}"


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    # A group of its own: a server's sessions are processes too, and end with it.
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    port = free_port()
    host = ("--host", "127.0.0.1")
    tracker = start(
        tmp_path, "tvm.exec.rpc_tracker", *host, "--port", str(port), "--port-end", str(port + 1)
    )
    found = Machines(port, tracker, [])
    try:
        wait_for(found, 0)
        for _ in range(SERVERS):
            own = free_port()
            found.servers.append(
                start(
                    tmp_path, "tvm.exec.rpc_server", *host, "--port", str(own),
                    "--port-end", str(own + 1), "--tracker", f"127.0.0.1:{port}", "--key", KEY,
                )
            )  # fmt: skip
        wait_for(found, SERVERS)
        yield found
    finally:
        for process in [*found.servers, tracker]:
            signal_group(process, signal.SIGKILL)
            process.wait()


def wait_for(machines: Machines, servers: int) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            if machines.fleet.count() >= servers:
                return
        except TuningError as error:
            if not servers and "no servers at all" in str(error):
                return
        time.sleep(0.3)
    pytest.fail(f"the fleet did not start {servers} servers in 90 s")


def candidates(count: int) -> list[Candidate]:
    base = {"nt": 1, "multiple": 48, "threads": 1, "parts": 1, "share": 1}
    tiles = [(mr, kb) for kb in (16, 32, 48, 64) for mr in (1, 2, 3, 4, 6)]
    return [Candidate("sliced_rows", {**base, "mr": mr, "kb": kb}) for mr, kb in tiles[:count]]


def in_a_while(seconds: float, process: subprocess.Popen[bytes], number: int) -> threading.Timer:
    timer = threading.Timer(seconds, signal_group, (process, number))
    timer.start()
    return timer


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_server_that_is_lost_in_the_middle_loses_no_trial(
    machines: Machines, number: int
) -> None:
    wanted = candidates(18)
    with job_folder(small_job()) as folder, Measurer(1, machines.fleet, timeout=12) as measurer:
        assert measurer.width == SERVERS
        outcomes: Counter[int] = Counter()
        statuses = set()
        timer: threading.Timer | None = None
        for index, outcome in measurer.measure(folder, wanted):
            # Once all of them are at work.
            timer = timer or in_a_while(0.2, machines.servers[1], number)
            outcomes[index] += 1
            statuses.add(outcome.status)
    assert statuses == {"ok"}
    assert outcomes == Counter(range(len(wanted)))


def test_a_fleet_tunes_a_model_and_its_records_say_so(machines: Machines, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    model = small_model()
    found = ts.tune(model, trials=8, records=records, tracker=machines.address, threads=1)
    kept = read_records(records).records
    assert found.tasks[0].us is not None
    assert {record.subject.machine for record in kept} == {f"fleet:{KEY}"}
    assert len({record.key for record in kept}) == found.tasks[0].trials == 8
    assert all((record.error_share or 0) <= 1 for record in kept)
    # What was measured elsewhere is a hint here, not this machine's time.
    assert "measured" not in ts.plan(model, records=records, threads=1).decisions[0].reason

    for server in machines.servers:
        signal_group(server, signal.SIGKILL)
        server.wait()
    with pytest.raises(TuningError, match="no server"):
        ts.tune(model, trials=9, records=records, tracker=machines.address, threads=1)
    assert len(read_records(records).records) == len(kept)


def test_an_unknown_key_is_answered_with_those_that_there_are(machines: Machines) -> None:
    with pytest.raises(TuningError, match=f"no server of the key 'oven'; it has {KEY}"):
        Fleet("127.0.0.1", machines.port, "oven").count()


@pytest.mark.skipif(has_gpu(), reason="the servers reach this machine's GPU")
def test_a_machine_without_a_gpu_measures_no_kernels_for_one(
    machines: Machines, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    with pytest.raises(TuningError, match=f"key '{KEY}' has no NVIDIA GPU"):
        ts.tune(small_model(), target="cuda-sm80", records=records, tracker=machines.address)
    assert not records.exists()
    # The machine was given back.
    assert machines.fleet.count() == SERVERS


@pytest.mark.skipif(has_gpu(), reason="the servers reach this machine's GPU")
def test_machines_without_a_gpu_end_a_search_with_their_reason(machines: Machines) -> None:
    target = resolve_target("cuda-sm80")
    job = replace(small_job(), target=target_data(target), machine=machine_of(target, 1))
    with (
        job_folder(job) as folder,
        Measurer(1, machines.fleet) as measurer,
        pytest.raises(TuningError, match=r"answers any more .*has no NVIDIA GPU"),
    ):
        list(measurer.measure(folder, [Candidate("cuda_row_tiles", {})]))
