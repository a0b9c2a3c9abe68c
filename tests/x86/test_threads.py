"""A module is called from many threads and from forked processes, and nothing mixes or grows."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi
from deploy_support import large_input, large_module, large_output, pair_inputs, pair_module

import tvm_sparse as ts
from tvm_sparse import memory_pool
from tvm_sparse.cpu_features import available_cores
from tvm_sparse.errors import InputError
from tvm_sparse.runtime import CompiledModule


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "pair.so"
    pair_module().export(path)
    return path


def call_from_threads(module: CompiledModule, callers: int, calls: int) -> list[str]:
    """Call with random batches; return what differs from the same call in this thread alone."""
    cases = [pair_inputs(1 + seed, seed) for seed in range(16)]
    wanted = [[array.copy() for array in module(*case)] for case in cases]
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in rng.integers(len(cases), size=calls):
            got = module(*cases[number])
            if not all(map(np.array_equal, got, wanted[number])):
                wrong.append(f"caller {seed}, case {number}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(callers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


@pytest.mark.filterwarnings("ignore:the module asks for 2 threads")
@pytest.mark.parametrize(("instances", "threads"), [(1, 1), (3, 1), (8, 1), (2, 2)])
def test_eight_callers_have_the_answers_of_one(library: Path, instances: int, threads: int) -> None:
    module = ts.load_module(library, threads=threads, instances=instances)
    assert module.instances == instances
    assert not call_from_threads(module, callers=8, calls=30)


def test_a_second_instance_of_a_module_that_was_not_exported_finds_its_weights() -> None:
    module, x = large_module(), large_input()
    module._machines.limit = 2
    with module._machines.lent():
        np.testing.assert_array_equal(module(x), large_output(x))
    assert module._machines._made == 2


def test_there_are_as_many_instances_as_have_cores_for_their_threads(library: Path) -> None:
    cores = len(available_cores())
    assert ts.load_module(library, threads=1).instances == cores
    assert ts.load_module(library, threads=2 * cores).instances == 1
    assert ts.load_module(library, threads=1, cpus=[available_cores()[0]]).instances == 1


def test_more_threads_than_cores_are_said_where_the_module_is_called(library: Path) -> None:
    module = ts.load_module(library, threads=2, cpus=[available_cores()[0]])
    for call in (module, lambda x, z: module.run({"x": x, "z/0": z})):
        with pytest.warns(RuntimeWarning, match="asks for 2 threads and runs on 1") as found:
            call(*pair_inputs())
        assert found[0].filename == __file__
        module._machines._free[0]._team = None


def test_a_module_runs_on_its_cores_alone(library: Path) -> None:
    core = available_cores()[-1]
    module = ts.load_module(library, threads=1, cpus=[core])
    before = os.sched_getaffinity(0)
    x, z = pair_inputs()
    wanted = ts.load_module(library, threads=1)(x, z)
    for got, want in zip(module(x, z), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    with module._machines.lent() as machine:
        assert machine._team.run(lambda: os.sched_getaffinity(0)) == {core}
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"instances": 0}, "has one instance or more, not 0"),
        ({"cpus": [1 << 20]}, "may use no core 1048576; it has "),
        ({"cpus": []}, "may use none of no cores"),
    ],
)
def test_wrong_options_are_refused(
    library: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        ts.load_module(library, **options)


# A process of its own: pytest's has threads of other tests, which no fork can be safe from.
FORKS = """
import multiprocessing, os, sys, threading, warnings
import numpy as np
import tvm_sparse as ts

warnings.simplefilter("ignore")
module = ts.load_module(sys.argv[1], threads=int(sys.argv[2]), instances=2)
rng = np.random.default_rng(0)
inputs = [rng.standard_normal((40, size)).astype(np.float32) for size in (8, 5)]
wanted = [array.copy() for array in module(*inputs)]

def is_right():
    return all(map(np.array_equal, module(*inputs), wanted))

def from_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(is_right()))
    thread.start()
    thread.join()
    return found == [True]

def child():
    # Its end has to work too: TVM ends its pools there.
    sys.exit(0 if is_right() and from_a_thread() else 1)

def forked():
    pid = os.fork()
    if pid == 0:
        child()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

codes = [forked() for _ in range(2)]
stop = threading.Event()
wrong = []

def call():
    while not stop.is_set():
        if not is_right():
            wrong.append(1)

callers = [threading.Thread(target=call) for _ in range(3)]
for caller in callers:
    caller.start()
codes += [forked() for _ in range(3)]
stop.set()
for caller in callers:
    caller.join()
worker = multiprocessing.get_context("fork").Process(target=child)
worker.start()
worker.join()
print([*codes, worker.exitcode], len(wrong), is_right())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_children_of_a_fork_use_the_modules_of_their_parent(library: Path, threads: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FORKS), str(library), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 0, 0, 0, 0, 0] 0 True\n", done.stderr


def test_memory_of_many_sizes_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    name = "vm.builtin.memory_manager.clear"
    real, find = tvm_ffi.get_global_func(name), tvm_ffi.get_global_func

    def get(asked: str, *args: object, **options: object) -> object:
        if asked != name:
            return find(asked, *args, **options)
        return lambda: (cleared.append(1), real())

    monkeypatch.setattr(tvm_ffi, "get_global_func", get)
    monkeypatch.setattr(memory_pool, "_met", set())
    module = pair_module()
    for batch in range(1, memory_pool.KEPT_SIZES + 1):
        module(*pair_inputs(batch))
    module(*pair_inputs(1))
    assert not cleared
    module(*pair_inputs(memory_pool.KEPT_SIZES + 1))
    assert cleared == [1]
    x, z = pair_inputs(1)
    assert module(x, z)[0].shape == (1, 5)
