"""Time short calls side by side: hot, with weights in rotation, and with cold caches.

What calling costs (Python, the argument checks of a foreign function) is measured with a call that
does nothing and subtracted.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[], Any]

# A sample is at least this long, so that the clock is exact enough.
_SHORTEST_SAMPLE = 1e-3
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 60


@dataclass(frozen=True)
class System:
    """Something to time.

    Attributes
    ----------
    calls : sequence of callable
        The same work on differently permuted weights; the first one is the hot one.
    nothing : callable
        A call of the same kind that does nothing.
    buffers : sequence of numpy.ndarray
        All that the first call reads and writes, where that is known.
    owners : sequence
        What has to live as long as the calls.
    """

    calls: Sequence[Call]
    nothing: Call
    buffers: Sequence[np.ndarray] = ()
    owners: Sequence[Any] = ()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in microseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarise samples."""
        low, median, high = np.percentile(np.array(seconds) * 1e6, [25, 50, 75]).tolist()
        return cls(round(median, 3), round(low, 3), round(high, 3))


def overhead(call: Call, samples: int = 15, inner: int = 1000) -> float:
    """Return the seconds of one of many calls in a row."""
    return statistics.median(_sample([call], inner) for _ in range(samples))


def _sample(calls: Sequence[Call], turns: int) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        for call in calls:
            call()
    return (time.perf_counter() - start) / (turns * len(calls))


def hot(systems: Mapping[str, System], seconds: float) -> dict[str, Spread]:
    """Repeat each system's first call, in rounds of rotating order."""
    return _interleave({name: (s.calls[:1], s.nothing) for name, s in systems.items()}, seconds)


def rotating(systems: Mapping[str, System], seconds: float) -> dict[str, Spread]:
    """Take each system's calls in turn, so that loops have other lengths every time."""
    several = {n: (s.calls, s.nothing) for n, s in systems.items() if len(s.calls) > 1}
    return _interleave(several, seconds)


def _interleave(
    systems: Mapping[str, tuple[Sequence[Call], Call]], seconds: float
) -> dict[str, Spread]:
    names = list(systems)
    turns, length = {}, 0.0
    for name in names:
        calls = systems[name][0]
        _sample(calls, 1)
        one = _sample(calls, 1) * len(calls)
        turns[name] = max(1, math.ceil(_SHORTEST_SAMPLE / one))
        length += one * (turns[name] + 1)
    rounds = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, int(seconds / max(length, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    with _no_collector():
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                calls, nothing = systems[name]
                # The system before left its own data in the caches.
                _sample([nothing], 3)
                costs[name].append(_sample([nothing], min(turns[name] * len(calls), 200)))
                _sample(calls, 1)
                times[name].append(_sample(calls, turns[name]))
    return _without_costs(times, costs)


def _without_costs(
    times: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]]
) -> dict[str, Spread]:
    """Subtract the median cost of calling, measured in the same rounds."""
    return {
        name: Spread.of([max(0.0, time - statistics.median(costs[name])) for time in samples])
        for name, samples in times.items()
    }


class Caches:
    """Empties the caches: known buffers line by line, everything else by reading a larger one."""

    def __init__(self, library: Any, largest: int) -> None:
        self.library = library
        self.filler = np.ones(max(2 * largest, 1 << 20), np.uint8)

    def flush(self, buffers: Sequence[np.ndarray]) -> None:
        """Make sure that nothing of `buffers` is in a cache, and hardly anything else."""
        self.library.walk(self.filler.ctypes.data, self.filler.nbytes)
        for array in buffers:
            self.library.flush_buffer(array.ctypes.data, array.nbytes)


def cold(systems: Mapping[str, System], caches: Caches, rounds: int = 15) -> dict[str, Spread]:
    """Call each system once with cold caches, in rounds of rotating order."""
    names = list(systems)
    times: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    with _no_collector():
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                system = systems[name]
                caches.flush(system.buffers)
                # Python and the way into the library are not what is to be cold.
                for _ in range(3):
                    cost = _sample([system.nothing], 1)
                times[name].append(_sample(system.calls[:1], 1))
                costs[name].append(cost)
    return _without_costs(times, costs)


def fastest(system: System, samples: int = 4) -> float:
    """Return the microseconds of the fastest of a few samples: a quick look at one system."""
    call = system.calls[0]
    call()
    one = _sample([call], 1)
    turns = max(1, math.ceil(_SHORTEST_SAMPLE / max(one, 1e-7)))
    cost = overhead(system.nothing, 3)
    return max(0.0, min(_sample([call], turns) for _ in range(samples)) - cost) * 1e6


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
