"""Tutorial 3: tune once, keep the records, and let a fleet of machines do it.

Run it as it stands: ``python tutorials/03_tune_and_keep_records.py``. It takes about a minute, most
of it for starting the fleet. `pip install 'tvm-sparse[tune]'` brings what it needs.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# TVM reads this when its thread pool starts, so it stands before everything else.
os.environ.setdefault("TVM_NUM_THREADS", "1")

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.errors import TuningError
from tvm_sparse.tuning.measurer import Fleet

folder = Path(tempfile.mkdtemp(prefix="tvm-sparse-tutorial-"))
records = folder / "records.jsonl"
encoder = zoo.bert_encoder(layers=1, hidden=128, heads=2, ffn=256, seq=32)
model = ts.load(ts.prune(encoder, pattern="unstructured", sparsity=0.9, scope="layer"))

# Why tune
# --------
# Without records, a plan goes by a cost model: it is right within a tenth or so, which is enough to
# tell sparse from dense and mostly enough to choose a tile. Tuning measures: on your machine, with
# your own weights, called in turn as a network calls them. Every kernel is held against float64
# before it is timed, dense ones compete with sparse ones, and whatever crashes or hangs in the
# process that measures costs nothing but itself.

untuned = ts.plan(model)
result = ts.tune(model, trials=6, records=records)
print(result)
assert result.tuned_us > 0

# What was kept
# -------------
# Each trial is one line of JSON, added as soon as it was measured. Its key covers everything that
# the kernel and its time depend on: shape, epilogue, threads, the weights' digests, target,
# processor, the kernels' own sources, TVM's version. So a stopped search goes on where it was, two
# processes may write to one file, and a second run measures nothing twice.

print(records.read_text().splitlines()[0][:160], "...")
again = ts.tune(model, trials=6, records=records)
assert all(task.reused == task.trials for task in again.tasks)

# What it is good for
# -------------------
# `plan`, `compile`, `build` and the pipeline inside TVM take the file. A layer that was measured
# gets its fastest kernel. One that was not (a retrained weight, another length) gets what the most
# similar layer got, and the reason says so.

tuned = ts.plan(model, records=records)
assert all(decision.source == "record" for decision in tuned.decisions)
retrained = ts.load(
    ts.prune(zoo.bert_encoder(layers=1, hidden=128, heads=2, ffn=256, seq=32, seed=1), sparsity=0.9)
)
print(ts.plan(retrained, records=records).decisions[0].reason)

module = ts.compile(model, records=records)
module.report.to_html(folder / "report.html")  # with a plot of every search
print(f"the report is in {folder / 'report.html'}")

# A fleet
# -------
# The machine that compiles need not be the one that runs. TVM's tracker lends machines that run its
# RPC server; here all of them are this computer. On your boards you would start
#
#     python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190     # once, in a trusted network
#     python -m tvm.exec.rpc_server --tracker TRACKER:9190 --key zen5    # on every board
#     tvm-sparse tune model.onnx --target '{"kind": "llvm", "mcpu": "znver5"}' \
#         --records zen5.jsonl --tracker TRACKER:9190 --key zen5
#
# An RPC server runs what it is sent: keep it to loopback or to a network that you trust. Trials are
# spread over all machines of the key; one that dies or hangs loses its trial, which then runs
# elsewhere. Records of a fleet hold for its target, and are hints on any other machine.


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def at(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]


def start(*arguments: str) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, **quiet)


def machines_of(fleet: Fleet) -> int:
    try:
        return fleet.count()
    except TuningError:
        return 0


def tune_on_a_fleet() -> None:
    port = free_port()
    processes = [start("tvm.exec.rpc_tracker", *at(port))]
    try:
        for _ in range(2):
            tracker = ("--tracker", f"127.0.0.1:{port}", "--key", "board")
            processes.append(start("tvm.exec.rpc_server", *at(free_port()), *tracker))
        fleet = Fleet("127.0.0.1", port, "board")
        end = time.monotonic() + 90
        while machines_of(fleet) < 2 and time.monotonic() < end:
            time.sleep(0.5)
        address = f"127.0.0.1:{port}/board"
        print(ts.tune(model, trials=2, records=folder / "fleet.jsonl", tracker=address))
    finally:
        for process in processes:
            process.kill()


if importlib.util.find_spec("tornado") is None:
    print("TVM's tracker needs tornado: pip install 'tvm-sparse[tune]'")
else:
    tune_on_a_fleet()
print("done")
