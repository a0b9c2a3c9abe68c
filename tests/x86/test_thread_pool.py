"""TVM's workers run on every core of the process but their caller's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from deploy_support import pair_inputs, pair_module

from tvm_sparse import thread_pool
from tvm_sparse.cpu_features import available_cores

CORES = available_cores()

needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="this process may use one core only")


def in_new_thread(work: Callable[[], None]) -> None:
    """Run something in a Python thread of its own, which has a pool of its own."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:  # handed to the test's own thread
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@needs_two_cores
def test_workers_follow_their_caller_to_other_cores() -> None:
    module = pair_module()
    module.threads = 2

    def work() -> None:
        for core in (CORES[0], CORES[-1], CORES[0]):
            os.sched_setaffinity(0, {core})
            module(*pair_inputs())
            # Other tests' threads may start meanwhile and be counted in: of ours there is one.
            assert thread_pool._pool.workers
            for worker in thread_pool._pool.workers:
                assert os.sched_getaffinity(worker) == thread_pool._pool.cores - {core}

    # The pool's cores are those that its thread may use when it starts.
    def start_on_all_cores() -> None:
        assert thread_pool.start_threads(2) == 2
        thread_pool._pool.threads = 2
        work()

    in_new_thread(start_on_all_cores)


@needs_two_cores
def test_modules_on_one_thread_leave_workers_where_they_are() -> None:
    module = pair_module()
    module.threads = 1

    def work() -> None:
        module(*pair_inputs())
        assert thread_pool._pool.caller is None

    in_new_thread(work)


def test_a_thread_that_has_ended_is_passed_over() -> None:
    ended = threading.Thread(target=lambda: None)
    ended.start()
    number = ended.native_id
    ended.join()
    assert number is not None
    thread_pool.place_threads([number], frozenset(CORES))


def test_threads_stay_where_no_core_is_left() -> None:
    before = os.sched_getaffinity(0)
    thread_pool.place_threads([0], frozenset())
    assert os.sched_getaffinity(0) == before
