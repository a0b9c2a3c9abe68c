"""Requests are put together, computed once, and each gets its own rows back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tvm_sparse.errors import InputError, SparseError
from tvm_sparse.model import TensorSpec
from tvm_sparse.serving.batching import Batcher
from tvm_sparse.serving.rows import batch_size_name, check_rows

X = TensorSpec("x", ("batch", 3), "float32")
Y = TensorSpec("y", ("batch", 3), "float32")


@dataclass
class Doubling:
    """A module that doubles, notes how many rows it had each time, and can be held up."""

    instances: int = 1
    inputs: tuple[TensorSpec, ...] = (X,)
    outputs: tuple[TensorSpec, ...] = (Y,)
    rows: list[int] = field(default_factory=list)
    may_run: threading.Event = field(default_factory=threading.Event)
    compute: Callable[[np.ndarray], np.ndarray] = lambda x: 2 * x

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.may_run.wait(60)
        self.rows.append(len(inputs["x"]))
        return {"y": self.compute(inputs["x"])}


def rows_of(number: int, count: int = 1, width: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.full((count, width), number, np.float32)}


@pytest.fixture
def module() -> Doubling:
    return Doubling()


def batcher(module: Any, max_batch: int = 1, max_delay: float = 0.0) -> Batcher:
    return Batcher(module, max_batch, max_delay)


def test_requests_are_left_alone_unless_asked_for(module: Doubling) -> None:
    queue = batcher(module)
    answers = [queue.submit(rows_of(number)) for number in range(5)]
    module.may_run.set()
    for number, answer in enumerate(answers):
        np.testing.assert_array_equal(answer.result(60)["y"], [[2 * number] * 3])
    assert module.rows == [1] * 5
    queue.close()


def test_what_waits_goes_together_and_comes_apart(module: Doubling) -> None:
    queue = batcher(module, max_batch=8)
    first = queue.submit(rows_of(0))
    while queue._waiting:
        time.sleep(0.001)
    counts = [1, 3, 2, 2, 1]
    answers = [queue.submit(rows_of(1 + number, count)) for number, count in enumerate(counts)]
    module.may_run.set()
    assert first.result(60)["y"].shape == (1, 3)
    for number, (count, answer) in enumerate(zip(counts, answers, strict=True)):
        np.testing.assert_array_equal(answer.result(60)["y"], [[2 * (1 + number)] * 3] * count)
    assert module.rows == [1, 8, 1]
    queue.close()


def test_a_larger_request_runs_alone(module: Doubling) -> None:
    module.may_run.set()
    queue = batcher(module, max_batch=4, max_delay=60.0)
    assert queue.submit(rows_of(1, 9)).result(60)["y"].shape == (9, 3)
    queue.close()


def test_other_sizes_do_not_go_together(module: Doubling) -> None:
    queue = batcher(module, max_batch=8)
    sizes = [3, 5, 3, 5]
    answers = [queue.submit(rows_of(1, width=width)) for width in sizes]
    module.may_run.set()
    for width, answer in zip(sizes, answers, strict=True):
        assert answer.result(60)["y"].shape == (1, width)
    queue.close()


def test_a_request_waits_for_others_until_the_batch_is_full(module: Doubling) -> None:
    module.may_run.set()
    # Longer than the test may take: a full batch alone ends the waiting.
    queue = batcher(module, max_batch=3, max_delay=600.0)
    answers = [queue.submit(rows_of(number)) for number in range(3)]
    for answer in answers:
        answer.result(60)
    assert module.rows == [3]
    queue.close()


def test_a_request_does_not_wait_longer_than_its_delay(module: Doubling) -> None:
    module.may_run.set()
    queue = batcher(module, max_batch=3, max_delay=0.01)
    assert queue.submit(rows_of(1)).result(60)
    assert module.rows == [1]
    queue.close()


def test_idle_instances_do_not_part_what_goes_together() -> None:
    module = Doubling(instances=4)
    module.may_run.set()
    queue = batcher(module, max_batch=4, max_delay=600.0)
    answers = [queue.submit(rows_of(number)) for number in range(8)]
    for answer in answers:
        answer.result(60)
    assert module.rows == [4, 4]
    queue.close()


def test_a_cancelled_request_is_not_run(module: Doubling) -> None:
    queue = batcher(module)
    running = queue.submit(rows_of(0))
    while queue._waiting:
        time.sleep(0.001)
    cancelled, last = queue.submit(rows_of(1)), queue.submit(rows_of(2, 5))
    assert cancelled.cancel()
    module.may_run.set()
    assert running.result(60) and last.result(60)
    assert module.rows == [1, 5]
    queue.close()


def test_a_failure_is_the_answer_and_the_next_request_runs(module: Doubling) -> None:
    def fail_once(x: np.ndarray) -> np.ndarray:
        module.compute = lambda x: 2 * x
        raise InputError("no")

    module.compute = fail_once
    module.may_run.set()
    queue = batcher(module)
    with pytest.raises(InputError, match="no"):
        queue.submit(rows_of(1)).result(60)
    assert queue.submit(rows_of(1)).result(60)["y"].shape == (1, 3)
    queue.close()


def test_closing_runs_what_is_queued_and_takes_no_more(module: Doubling) -> None:
    queue = batcher(module, max_batch=2, max_delay=600.0)
    answers = [queue.submit(rows_of(number)) for number in range(5)]
    module.may_run.set()
    queue.close()
    assert all(answer.done() for answer in answers)
    assert not any(thread.is_alive() for thread in queue._threads)
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(rows_of(1))


def test_many_threads_get_their_own_rows() -> None:
    module = Doubling(instances=3)
    module.may_run.set()
    queue = batcher(module, max_batch=7, max_delay=0.001)
    wrong = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            x = rng.standard_normal((rng.integers(1, 4), 3)).astype(np.float32)
            if not np.array_equal(queue.submit({"x": x}).result(60)["y"], 2 * x):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    queue.close()
    assert not wrong and max(module.rows) <= 7


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, shape, dtype)


@pytest.mark.parametrize(
    ("inputs", "outputs", "name"),
    [
        ((X,), (Y,), "batch"),
        ((X, tensor("n", "batch")), (Y,), "batch"),
        ((X, tensor("n", "other")), (Y,), None),
        ((X,), (tensor("y", 3),), None),
        ((X,), (tensor("y"),), None),
        ((tensor("x", 4, 3),), (tensor("y", 4, 3),), None),
        ((X,), (tensor("y", "batch", "batch"),), None),
    ],
)
def test_a_batch_is_a_size_that_everything_begins_with(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], name: str | None
) -> None:
    assert batch_size_name(inputs, outputs) == name


def running(compute: Callable[[np.ndarray], np.ndarray], **fields: Any) -> Any:
    module = Doubling(compute=compute, **fields)
    module.may_run.set()
    return module


def test_rows_that_are_computed_alone_may_go_together() -> None:
    assert check_rows(running(np.tanh), {})


def test_rows_that_differ_by_rounding_may_go_together() -> None:
    def rounded(x: np.ndarray) -> np.ndarray:
        return (x * np.float32(1 + 1e-6 * len(x))).astype(np.float32)

    assert not check_rows(running(rounded), {})


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x - x.mean(axis=0),
        lambda x: x[::-1].copy(),
        lambda x: x / np.abs(x).max(),
        lambda x: np.cumsum(x, axis=0),
        lambda x: x * 0 + np.nan,
        lambda x: x[:1],
    ],
)
def test_rows_that_depend_on_each_other_never_go_together(
    compute: Callable[[np.ndarray], np.ndarray],
) -> None:
    with pytest.raises(SparseError, match="cannot be put together"):
        check_rows(running(compute), {})


def test_without_a_batch_nothing_goes_together() -> None:
    with pytest.raises(SparseError, match="do not all begin with one symbolic size"):
        check_rows(running(np.tanh, inputs=(tensor("x", 4, 3),)), {})


def test_a_model_that_refuses_random_inputs_is_not_trusted() -> None:
    def refuse(_x: np.ndarray) -> np.ndarray:
        raise InputError("not these")

    with pytest.raises(SparseError, match="cannot be seen on random inputs: not these"):
        check_rows(running(refuse), {})
