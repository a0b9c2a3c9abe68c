"""Teams of threads: as many as asked for, on every core but their leader's."""

from __future__ import annotations

import gc
import os
import threading
import time

import numpy as np
import pytest
from deploy_support import pair_inputs, pair_module

from tvm_sparse import thread_pool
from tvm_sparse.cpu_features import available_cores
from tvm_sparse.thread_pool import Team

CORES = available_cores()

needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="this process may use one core only")

pytestmark = pytest.mark.usefixtures("runtime")


@pytest.fixture(scope="module")
def runtime() -> None:
    pair_module()


@needs_two_cores
def test_a_team_has_the_workers_that_it_was_asked_for() -> None:
    team = Team(2)
    assert len(team.run(lambda: thread_pool._pool.workers)) == 1
    assert team.run(threading.get_ident) != threading.get_ident()


@needs_two_cores
def test_workers_follow_their_leader_to_other_cores() -> None:
    team = Team(2)

    def move_to(core: int) -> None:
        os.sched_setaffinity(0, {core})

    def where() -> list[set[int]]:
        return [os.sched_getaffinity(worker) for worker in thread_pool._pool.workers]

    for core in (CORES[0], CORES[-1], CORES[0]):
        team.run(lambda core=core: move_to(core))
        assert team.run(where) == [set(CORES) - {core}]


def test_a_team_keeps_to_its_cores_and_the_caller_stays_where_it_was() -> None:
    before = os.sched_getaffinity(0)
    team = Team(1, [CORES[-1]])
    assert team.run(lambda: os.sched_getaffinity(0)) == {CORES[-1]}
    assert os.sched_getaffinity(0) == before


def test_too_many_threads_are_said_and_not_started() -> None:
    with pytest.warns(RuntimeWarning, match=r"asks for 3 threads and runs on 1: it may use 1 core"):
        team = Team(3, [CORES[0]])
    assert team.run(lambda: thread_pool._pool.workers) == ()


def test_what_a_task_raises_is_the_callers() -> None:
    team = Team(1)

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        team.run(fail)
    assert team.run(lambda: 5) == 5


def test_a_leader_ends_with_its_team() -> None:
    team = Team(1)
    leader = team.run(threading.current_thread)
    del team
    gc.collect()
    leader.join(60)
    assert not leader.is_alive()


def test_a_system_that_starts_no_threads_is_an_error_and_not_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_threads: int) -> int:
        raise RuntimeError("no more threads")

    monkeypatch.setattr(thread_pool, "start_threads", refuse)
    team = Team(2, CORES)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more threads"):
            team.run(lambda: 5)


def test_a_module_on_one_thread_runs_in_its_callers() -> None:
    module = pair_module()
    module.threads = 1
    module(*pair_inputs())
    assert thread_pool._pool.is_one and not thread_pool._pool.workers


@needs_two_cores
def test_the_number_of_threads_may_change_between_calls() -> None:
    module = pair_module()
    x, z = pair_inputs(40)
    module.threads = 1
    wanted = module(x, z)
    for threads in (2, 1, 2):
        module.threads = threads
        for got, want in zip(module(x, z), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


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


def test_an_interrupted_caller_waits_for_what_it_uses() -> None:
    team = Team(1)
    done = threading.Event()

    class Interrupted(Exception):
        pass

    def slow() -> None:
        time.sleep(0.2)
        done.set()

    task = thread_pool._Task
    real = threading.Lock

    class Once(task):
        """Its lock is interrupted the first time that it is waited for."""

        def __init__(self, work: object) -> None:
            super().__init__(work)
            lock = real()
            lock.acquire()

            class Interrupting:
                asked = 0

                def acquire(self) -> None:
                    self.asked += 1
                    if self.asked == 1:
                        raise Interrupted
                    lock.acquire()

                def release(self) -> None:
                    lock.release()

            self.done = Interrupting()

    thread_pool._Task = Once
    try:
        with pytest.raises(Interrupted):
            team.run(slow)
    finally:
        thread_pool._Task = task
    assert done.is_set()
