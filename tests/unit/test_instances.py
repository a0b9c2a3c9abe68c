"""Instances are lent to one caller at a time, made when needed, and whole in a fork's child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count

import pytest

from tvm_sparse import instances
from tvm_sparse.instances import InstancePool


def numbered() -> Callable[[], int]:
    return count().__next__


def test_the_first_instance_is_made_at_once_and_used_again() -> None:
    made: list[int] = []
    pool = InstancePool(lambda: made.append(len(made)) or made[-1], limit=3)
    assert made == [0]
    for _ in range(5):
        with pool.lent() as instance:
            assert instance == 0
    assert made == [0]


def test_callers_at_the_same_time_have_instances_of_their_own() -> None:
    pool = InstancePool(numbered(), limit=3)
    with pool.lent() as one, pool.lent() as two, pool.lent() as three:
        assert {one, two, three} == {0, 1, 2}


def test_a_caller_too_many_waits_for_one() -> None:
    pool = InstancePool(numbered(), limit=1)
    got = []

    def take() -> None:
        with pool.lent() as instance:
            got.append(instance)

    with pool.lent():
        waiting = threading.Thread(target=take)
        waiting.start()
        waiting.join(0.05)
        assert not got
    waiting.join(60)
    assert got == [0]


def test_no_two_callers_have_the_same_one() -> None:
    pool = InstancePool(lambda: threading.Lock(), limit=3)
    clashes = []

    def work() -> None:
        for _ in range(200):
            with pool.lent() as lock:
                if not lock.acquire(blocking=False):
                    clashes.append(lock)
                    return
                lock.release()

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not clashes


def test_an_instance_comes_back_from_a_call_that_failed() -> None:
    pool = InstancePool(numbered(), limit=1)
    with pytest.raises(KeyError), pool.lent():
        raise KeyError
    with pool.lent() as instance:
        assert instance == 0


def test_an_instance_that_cannot_be_made_is_tried_again() -> None:
    answers = iter([0, MemoryError(), 1])

    def make() -> int:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    pool = InstancePool(make, limit=2)
    with pool.lent():
        with pytest.raises(MemoryError), pool.lent():
            pass
        with pool.lent() as second:
            assert second == 1


def exit_code_of_child(work: Callable[[], bool]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_waits_for_the_calls_that_run() -> None:
    pool = InstancePool(numbered(), limit=2)
    started, may_end, is_over = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        with pool.lent():
            started.set()
            may_end.wait()
            is_over.set()

    caller = threading.Thread(target=call)
    caller.start()
    started.wait()
    threading.Timer(0.1, may_end.set).start()

    def child() -> bool:
        # All instances are there: none was lent at the moment of the fork.
        with pool.lent(), pool.lent():
            return is_over.is_set()

    assert exit_code_of_child(child) == 0
    caller.join()


def test_threads_call_on_while_others_fork() -> None:
    pool = InstancePool(numbered(), limit=2)
    stop = threading.Event()
    calls = [0, 0]

    def call(number: int) -> None:
        while not stop.is_set():
            with pool.lent():
                calls[number] += 1

    callers = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(20):

            def child() -> bool:
                with pool.lent(), pool.lent():
                    return True

            assert exit_code_of_child(child) == 0
    finally:
        stop.set()
    for caller in callers:
        caller.join()
    assert all(calls)
    assert instances._calls._running == 0
