"""TVM's threads: how many a module runs on, and on which cores they run.

TVM keeps a pool of threads for every thread that runs modules: the thread itself and its workers.
It cannot grow, and it does not survive in the child of a fork, where the workers are missing: the
child's first call would wait for them forever. So what runs on several threads runs in a `Team`: a
thread of ours leads workers of TVM, exactly as many as were asked for, and a child makes teams of
its own. What runs on one thread needs no workers, and runs in the caller's.

Workers wait for work by spinning and yielding; a worker that the system puts on the core of the
thread that leads it runs in turns with it, for tens of milliseconds, until the system's balancing
parts them, and two threads are as slow as one. So workers may run on every core but the leader's.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from .cpu_features import available_cores

Result = TypeVar("Result")

_SHARE_ALL_CORES = -3

# Of each Python thread: its pool's workers, where they may run, and where the thread ran last.
_pool = threading.local()
_starting = threading.Lock()

_TASKS = Path("/proc/self/task")


class Team:
    """A thread that leads TVM's workers: what it is given to run runs on all of them.

    Parameters
    ----------
    threads : int
        The leader included.
    cores : sequence of int, optional
        Where they may run, by the system's numbers; by default where the calling thread may.

    Warns
    -----
    RuntimeWarning
        When there are fewer cores than threads: it gets as many threads as there are cores.
    """

    def __init__(self, threads: int, cores: Sequence[int] | None = None) -> None:
        self.threads, self.process = threads, os.getpid()
        _warn_of_too_many(threads, available_cores() if cores is None else cores)
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        arguments = (self._tasks, threads, cores)
        threading.Thread(target=_lead, args=arguments, name="tvm-sparse", daemon=True).start()
        # The leader does not know the team, so that it ends when nobody does.
        weakref.finalize(self, self._tasks.put, None)

    def run(self, work: Callable[[], Result]) -> Result:
        """Have something done by the leader, and wait for what it returns or raises."""
        task = _Task(work)
        self._tasks.put(task)
        try:
            task.done.acquire()
        except BaseException:
            # Ctrl-C ends the waiting, not the work: what that uses is not free before it is done.
            task.done.acquire()
            raise
        if task.error is not None:
            raise task.error
        return task.result


class _Task:
    """Something to do, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def do(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:  # it is the caller's
            self.error = error


def _lead(tasks: SimpleQueue[_Task | None], threads: int, cores: Sequence[int] | None) -> None:
    failure = None
    try:
        if cores is not None:
            place_threads([0], frozenset(cores))
        start_threads(threads)
    except BaseException as error:  # the system may refuse to start a thread
        failure = error
    while (task := tasks.get()) is not None:
        if failure is None:
            _leave_the_leaders_core()
            task.do()
        else:
            task.error = failure
        task.done.release()
        # Nothing of a call is kept until the next one.
        del task


def start_threads(threads: int) -> int:
    """Give this Python thread's pool a number of threads, itself included.

    Returns
    -------
    int
        How many it got: no more than there are cores, and no more than it has had before.
    """
    import tvm_ffi

    cores = available_cores()
    size = min(threads, len(cores))
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    with _starting:
        before = _threads_of_process()
        # The pool is as large as this list when it starts.
        configure(_SHARE_ALL_CORES, size, [str(core) for core in cores[:size]])
        # Python's own threads may start meanwhile.
        python = {thread.native_id for thread in threading.enumerate()}
        started = _threads_of_process() - before - python
    _pool.workers = tuple(started) or getattr(_pool, "workers", ())
    _pool.cores, _pool.leader = frozenset(cores), None
    # TVM has put them all on the cores of the list.
    place_threads([0, *_pool.workers], _pool.cores)
    return int(tvm_ffi.get_global_func("runtime.NumThreads")())


def use_one_thread() -> None:
    """Run this Python thread's next kernels in it, and on nothing else."""
    if not getattr(_pool, "is_one", False):
        start_threads(1)
        _pool.is_one = True


def _warn_of_too_many(threads: int, cores: Sequence[int]) -> None:
    if threads > len(cores):
        allowed = "1 core" if len(cores) == 1 else f"{len(cores)} cores"
        warnings.warn(
            f"the module asks for {threads} threads and runs on {len(cores)}: it may use {allowed}",
            RuntimeWarning,
            # Where the module was called.
            stacklevel=6,
        )


def _leave_the_leaders_core() -> None:
    core = _current_core()
    if core is None or core == _pool.leader:
        return
    _pool.leader = core
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
