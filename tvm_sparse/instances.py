"""Virtual machines of one library, each for one call at a time.

TVM's virtual machine keeps the registers and frames of a call in itself, so two calls at once need
two of them. They share the library's code and its weights; registers, and the copies of inputs that
were not aligned, are their own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Instance = TypeVar("Instance")


class InstancePool(Generic[Instance]):
    """Lends instances to callers; the first is made at once, the others when they are needed.

    Parameters
    ----------
    make : callable
        Makes an instance.
    limit : int
        As many exist at most. A call that finds all of them lent waits for one.
    """

    def __init__(self, make: Callable[[], Instance], limit: int) -> None:
        self.limit = limit
        self._make = make
        self._free = [make()]
        self._made = 1
        self._returned = threading.Condition()

    def lent(self) -> Loan[Instance]:
        """Have an instance for oneself, in a `with`; a fork waits until it is given back."""
        return Loan(self)

    def take(self) -> Instance:
        """Take an instance; `give` gives it back."""
        _calls.begin()
        try:
            return self._take()
        except BaseException:
            _calls.end()
            raise

    def give(self, instance: Instance) -> None:
        """Give an instance back, to the caller who waits longest."""
        with self._returned:
            self._free.append(instance)
            self._returned.notify()
        _calls.end()

    def _take(self) -> Instance:
        with self._returned:
            # The one that was used last comes first: its memory is in the caches.
            while not self._free:
                if self._made < self.limit:
                    self._made += 1
                    break
                self._returned.wait()
            else:
                return self._free.pop()
        try:
            return self._make()
        except BaseException:
            with self._returned:
                self._made -= 1
                self._returned.notify()
            raise


class Loan(Generic[Instance]):
    """An instance of a pool, taken where a `with` begins and given back where it ends."""

    def __init__(self, pool: InstancePool[Instance]) -> None:
        self._pool = pool

    def __enter__(self) -> Instance:
        self._instance = self._pool.take()
        return self._instance

    def __exit__(self, *_: object) -> None:
        self._pool.give(self._instance)


class _Calls:
    """The calls that are running in this process, which a fork must not cut in two.

    The child has only the thread that forked. What another one was using then (an instance, the
    lock of TVM's memory) would stay taken forever. So forking waits until no call runs, and
    new calls wait for the end of it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._is_forking = False
        self._own = threading.local()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._hold, after_in_parent=self._go_on, after_in_child=self._go_on
            )

    def begin(self) -> None:
        """Count a call that begins; while the process forks, wait."""
        with self._changed:
            while self._is_forking:
                self._changed.wait()
            self._running += 1
        self._own.count = getattr(self._own, "count", 0) + 1

    def end(self) -> None:
        """Count a call that has ended."""
        self._own.count -= 1
        with self._changed:
            self._running -= 1
            if self._is_forking:
                self._changed.notify_all()

    def _hold(self) -> None:
        own = getattr(self._own, "count", 0)
        with self._changed:
            while self._is_forking:  # another thread's fork
                self._changed.wait()
            self._is_forking = True
            while self._running > own:
                self._changed.wait()
        # Forked with it in hand, so that no other thread has it in the child.
        self._changed.acquire()

    def _go_on(self) -> None:
        self._is_forking = False
        self._changed.notify_all()
        self._changed.release()


_calls = _Calls()
