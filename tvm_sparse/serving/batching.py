"""Requests that wait to be run, one by one or put together to one call of the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np

from ..runtime import Runner

Arrays = dict[str, np.ndarray]


class _Waiting:
    """A request that was not run yet."""

    def __init__(self, inputs: Mapping[str, np.ndarray], batches: bool) -> None:
        self.inputs = inputs
        self.rows = next(iter(inputs.values())).shape[0] if batches else 1
        # Requests with equal keys have equal sizes, but for the first.
        self.key = tuple(array.shape[1:] for array in inputs.values()) if batches else None
        self.since = time.monotonic()
        self.answer: Future[Arrays] = Future()


class Batcher:
    """Runs requests on a module's instances, in threads of its own.

    Parameters
    ----------
    module : Runner
        What runs them.
    max_batch : int
        Rows that are put together at most. A request that has more runs alone.
    max_delay : float
        Seconds that a request waits for others, while a thread has nothing else to run.
    observe : callable, optional
        Called after each call with its rows and its seconds.

    Notes
    -----
    With `max_batch` above 1 the first size of every input and output has to count rows, each of
    which is computed for itself; `rows.check_rows` makes sure of it.
    """

    def __init__(
        self,
        module: Runner,
        max_batch: int = 1,
        max_delay: float = 0.0,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._module, self._max_batch, self._max_delay = module, max_batch, max_delay
        self._observe = observe
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        # Of the thread that takes what runs next: two would part what goes together.
        self._turn = threading.Lock()
        self._is_closed = self._is_hurried = False
        self._threads = [
            threading.Thread(target=self._work, name="tvm-sparse-serve", daemon=True)
            for _ in range(module.instances)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, inputs: Mapping[str, np.ndarray]) -> Future[Arrays]:
        """Queue a request whose inputs fit the model; cancelled before its turn, it is not run."""
        waiting = _Waiting(inputs, self._max_batch > 1)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.answer

    def hurry(self) -> None:
        """Let requests wait for others no longer."""
        with self._changed:
            self._is_hurried = True
            self._changed.notify()

    def close(self) -> None:
        """Run what is queued, take nothing more, and end the threads."""
        with self._changed:
            self._is_closed = self._is_hurried = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._run(batch)
            # The arrays of a batch go with it, and not with the next one.
            del batch

    def _next(self) -> list[_Waiting]:
        """Take what runs next; nothing when there will not be any more."""
        with self._turn, self._changed:
            while not self._waiting:
                if self._is_closed:
                    return []
                self._changed.wait()
            batch = [self._waiting.popleft()]
            until = batch[0].since + self._max_delay
            while not self._fill(batch) and not self._is_hurried:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return batch

    def _fill(self, batch: list[_Waiting]) -> bool:
        """Move requests that go with a batch into it; say whether it has all that it can have."""
        rows = sum(each.rows for each in batch)
        kept: deque[_Waiting] = deque()
        while self._waiting and rows < self._max_batch:
            each = self._waiting.popleft()
            if each.key == batch[0].key and rows + each.rows <= self._max_batch:
                batch.append(each)
                rows += each.rows
            else:
                kept.append(each)
        self._waiting.extendleft(reversed(kept))
        return rows >= self._max_batch

    def _run(self, batch: list[_Waiting]) -> None:
        batch = [each for each in batch if each.answer.set_running_or_notify_cancel()]
        if not batch:
            return
        start = time.perf_counter()
        try:
            answers = self._answers(batch)
        except BaseException as error:  # it is the clients'
            for each in batch:
                each.answer.set_exception(error)
            return
        self._observe(sum(each.rows for each in batch), time.perf_counter() - start)
        for each, answer in zip(batch, answers, strict=True):
            each.answer.set_result(answer)

    def _answers(self, batch: list[_Waiting]) -> list[Arrays]:
        if len(batch) == 1:
            return [self._module.run(batch[0].inputs)]
        together = {
            name: np.concatenate([each.inputs[name] for each in batch]) for name in batch[0].inputs
        }
        outputs = self._module.run(together)
        ends = np.cumsum([each.rows for each in batch])
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(batch))]
