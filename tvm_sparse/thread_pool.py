"""TVM's threads: how many a module runs on, and on which cores they run.

TVM keeps one pool of threads for every Python thread that runs modules. Its workers wait for work
by spinning and yielding; a worker that the system puts on the core of the thread that called it
runs in turns with it, for tens of milliseconds, until the system's balancing parts them, and two
threads are as slow as one. So workers may run on every core of the process but the caller's.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from .cpu_features import available_cores

_SHARE_ALL_CORES = -3

# Of each Python thread: how its pool was configured, and where its caller ran last.
_pool = threading.local()
_starting = threading.Lock()

_TASKS = Path("/proc/self/task")


def start_threads(threads: int) -> int:
    """Give this Python thread's pool a number of threads, the caller included.

    Returns
    -------
    int
        How many it got: TVM's pool cannot grow once it has started.
    """
    import tvm_ffi

    cores = available_cores()
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    with _starting:
        before = _threads_of_process()
        configure(_SHARE_ALL_CORES, min(threads, len(cores)), [str(core) for core in cores])
        started = _threads_of_process() - before
    if started or not hasattr(_pool, "workers"):
        _pool.workers, _pool.cores = tuple(started), frozenset(cores)
    _pool.caller = None
    return int(tvm_ffi.get_global_func("runtime.NumThreads")())


def use_threads(threads: int) -> None:
    """Run this Python thread's next kernels on a number of threads.

    Warns
    -----
    RuntimeWarning
        Once a pool, when it cannot have as many.
    """
    if getattr(_pool, "threads", None) != threads:
        granted = start_threads(threads)
        _pool.threads = threads
        if granted < threads:
            asked, cores = ("1 thread" if threads == 1 else f"{threads} threads"), available_cores()
            warnings.warn(
                f"the module asks for {asked} and runs on {granted}: this machine allows "
                f"{len(cores)}, and TVM's pool cannot grow once it has started",
                RuntimeWarning,
                stacklevel=5,
            )
    if threads > 1:
        _leave_the_callers_core()


def _leave_the_callers_core() -> None:
    core = _current_core()
    if core is None or core == _pool.caller:
        return
    _pool.caller = core
    place_threads(_pool.workers, _pool.cores - {core})


def place_threads(threads: Sequence[int], cores: frozenset[int]) -> None:
    """Let threads, by the system's numbers, run on some cores only; those that ended do not mind.

    Nothing happens where no core is left, or the system cannot do it.
    """
    if not cores or not hasattr(os, "sched_setaffinity"):
        return
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
        except OSError:  # it has ended, or the cores were taken from this process
            continue


def _threads_of_process() -> set[int]:
    try:
        return {int(entry.name) for entry in _TASKS.iterdir()}
    except OSError:
        return set()


def _find_current_core() -> Callable[[], int] | None:
    try:
        function = ctypes.CDLL(None).sched_getcpu
    except (OSError, AttributeError, TypeError):
        return None
    function.restype = ctypes.c_int
    return function


_sched_getcpu = _find_current_core()


def _current_core() -> int | None:
    core = -1 if _sched_getcpu is None else _sched_getcpu()
    return None if core < 0 else core
