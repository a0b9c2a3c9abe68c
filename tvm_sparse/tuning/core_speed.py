"""What a core can do at most, and what starting threads costs: measured by small kernels."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ..cpu_features import available_cores, cache_bytes
from ..schedules.vectors import Vectors
from ..thread_pool import start_threads

# More independent sums than the latency of a multiply-add (4 or 5 cycles) times the units (2).
_SUMS = 12
_FMA_TURNS = 20_000

# Vectors that one turn of the reading loop takes.
_READS = 16
_BYTES_A_CALL = 4 << 20
# Beyond this, memory is fast enough told from caches that a machine keeps to itself.
_MOST_BYTES = 512 << 20

_REPEATS = 12


@dataclass(frozen=True)
class CoreSpeed:
    """Rates of one core, at the vector width of the target.

    Attributes
    ----------
    fma_gflops : float
        float32 multiply-adds between registers, counted as two.
    l1_gbytes, l2_gbytes, l3_gbytes, memory_gbytes : float
        Reading by whole vectors, in 1e9 bytes a second.
    fork_us : float or None
        Microseconds that a parallel loop takes to start and join its threads; None where there is
        one core only.
    """

    fma_gflops: float
    l1_gbytes: float
    l2_gbytes: float
    l3_gbytes: float
    memory_gbytes: float
    fork_us: float | None


def measure_core(target: Any, lanes: int, threads: int = 2) -> CoreSpeed:
    """Measure the core that this runs on, in a few seconds.

    Parameters
    ----------
    target : tvm.target.Target
        What the kernels are compiled for.
    lanes : int
        float32 elements of its vectors.
    threads : int
        Threads of the loop whose start is timed.
    """
    l1, l2, l3 = (cache_bytes(level) for level in (1, 2, 3))
    # Half of a cache: a whole one also holds other things.
    sizes = (l1 // 2, l2 // 2, max(2 * l2, min(8 << 20, l3 // 2)), min(4 * l3, _MOST_BYTES))
    kernel = _compile(_build_reading(lanes), target)
    near, middle, far, memory = (_reading_gbytes(kernel, lanes, size) for size in sizes)
    return CoreSpeed(
        fma_gflops=_fma_gflops(target, lanes),
        l1_gbytes=near,
        l2_gbytes=middle,
        l3_gbytes=far,
        memory_gbytes=memory,
        fork_us=fork_microseconds(target, threads),
    )


def fork_microseconds(target: Any, threads: int) -> float | None:
    """Time the start of a parallel loop that does nothing; None where nothing runs in parallel.

    TVM keeps a pool of threads for every Python thread: one of its own leaves that of the caller
    as it is.
    """
    cores = available_cores()
    if min(threads, len(cores)) < 2:
        return None
    function = _compile(_build_fork(threads), target)
    found: list[float] = []

    def measure() -> None:
        if start_threads(threads) < 2:
            return
        out = _tensor(np.zeros(threads, np.float32))
        found.append(_median_seconds(lambda: function(out), time.perf_counter) * 1e6)

    worker = threading.Thread(target=measure, name="fork")
    worker.start()
    worker.join()
    return round(found[0], 2) if found else None


def call_microseconds(target: Any, arguments: int = 6) -> float:
    """Time a call of a kernel that does nothing, on the clock that kernels are timed with."""
    function = _compile(_build_nothing(arguments), target)
    tensor = _tensor(np.zeros(1, np.float32))
    return round(
        _median_seconds(lambda: function(*[tensor] * arguments), time.thread_time) * 1e6, 2
    )


def _fma_gflops(target: Any, lanes: int) -> float:
    function = _compile(_build_fma(lanes), target)
    factors = _tensor(np.repeat(np.array([1.0, 1e-9], np.float32), lanes))
    out = _tensor(np.zeros(_SUMS * lanes, np.float32))
    seconds = _fastest_seconds(lambda: function(factors, out))
    return round(2e-9 * lanes * _SUMS * _FMA_TURNS / seconds, 1)


def _reading_gbytes(kernel: Callable[..., Any], lanes: int, size: int) -> float:
    step = _READS * lanes
    floats = max(1, size // 4 // step) * step
    passes = max(1, _BYTES_A_CALL // (4 * floats))
    data, out = _tensor(np.ones(floats, np.float32)), _tensor(np.zeros(step, np.float32))
    seconds = _fastest_seconds(lambda: kernel(data, passes, out))
    return round(4e-9 * floats * passes / seconds, 1)


def _build_fma(lanes: int) -> Any:
    """Multiply and add in registers, `_SUMS` times a turn: none waits for another."""
    vectors = Vectors(lanes)
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("fma")
            B.func_attr({"tirx.noalias": True})
            factors = B.arg("factors", B.Buffer((2 * lanes,), "float32"))
            out = B.arg("out", B.Buffer((_SUMS * lanes,), "float32"))
            scale, shift = (vectors.keep(vectors.load(factors, i * lanes)) for i in range(2))
            sums = [vectors.register() for _ in range(_SUMS)]
            for register in sums:
                vectors.store(register, vectors.zero())
            with B.serial(0, _FMA_TURNS):
                for register in sums:
                    vectors.store(register, vectors.load(register) * scale + shift)
            for i, register in enumerate(sums):
                vectors.store(out, vectors.load(register), i * lanes)
    return builder.get()


def _build_reading(lanes: int) -> Any:
    """Add up a buffer, by whole vectors, again and again."""
    vectors = Vectors(lanes)
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("reading")
            B.func_attr({"tirx.noalias": True})
            floats = tirx.Var("floats", "int64")
            data = B.arg("data", B.Buffer((floats,), "float32"))
            passes = B.arg("passes", T.int64())
            out = B.arg("out", B.Buffer((_READS * lanes,), "float32"))
            # Half as many sums as loads: 16 registers hold them, too.
            sums = [vectors.register() for _ in range(_READS // 2)]
            for register in sums:
                vectors.store(register, vectors.zero())
            turns = T.floordiv(floats, _READS * lanes)
            with B.serial(0, passes), B.serial(0, turns) as turn:
                for i in range(_READS):
                    register = sums[i % len(sums)]
                    value = vectors.load(data, (turn * _READS + i) * lanes)
                    vectors.store(register, vectors.load(register) + value)
            for i, register in enumerate(sums):
                vectors.store(out, vectors.load(register), i * lanes)
    return builder.get()


def _build_nothing(arguments: int) -> Any:
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("nothing")
            for i in range(arguments):
                B.arg(f"a{i}", B.Buffer((1,), "float32"))
            B.evaluate(0)
    return builder.get()


def _build_fork(threads: int) -> Any:
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("fork")
            out = B.arg("out", B.Buffer((threads,), "float32"))
            with B.parallel(0, threads) as thread:
                B.buffer_store(out, T.float32(1), [thread])
    return builder.get()


def _compile(function: Any, target: Any) -> Callable[..., Any]:
    import tvm

    kernel: Callable[..., Any] = tvm.compile(function.with_attr("global_symbol", "kernel"), target)[
        "kernel"
    ]
    return kernel


def _tensor(array: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.tensor(array)


def _fastest_seconds(call: Callable[[], Any]) -> float:
    """Return what the core needs at least: slower calls shared it with others."""
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def _median_seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    for _ in range(_REPEATS):
        call()
    times = []
    for _ in range(20 * _REPEATS):
        start = clock()
        call()
        times.append(clock() - start)
    return float(np.median(times))
