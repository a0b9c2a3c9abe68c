"""Time work on a GPU by its own events, several systems in turn; what the GPU says of itself.

Everything goes through the driver's library, which every machine with a GPU has.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from timing import Spread

Call = Callable[[], Any]

# A sample is at least this long: events tell half a microsecond, and launches overlap.
SHORTEST_SAMPLE = 5e-3
# What each system does before anything is timed, so that clocks have settled.
WARM_UP = 0.1
ROUNDS = 15
_LOOKS = 3

_L2_BYTES, _MULTIPROCESSORS, _MAJOR, _MINOR = 38, 16, 75, 76


class Clock(Protocol):
    """Tells how long work takes."""

    def seconds(self, work: Call) -> float:
        """Do the work, wait for its end, and return what it took."""


class Gpu:
    """The first GPU, and a clock on its default stream.

    Raises
    ------
    OSError
        When there is no driver.
    RuntimeError
        When the driver refuses.
    """

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._ask("cuInit", 0)
        self._device = ctypes.c_int()
        self._ask("cuDeviceGet", ctypes.byref(self._device), 0)
        # The context that CUDA's runtime, and with it all libraries, work in.
        self._context = ctypes.c_void_p()
        self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._ask("cuCtxSetCurrent", self._context)
        self._begin, self._end = self._event(), self._event()

    def _ask(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise RuntimeError(f"the driver's {name} failed with error {code}")

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._ask("cuEventCreate", ctypes.byref(event), 0)
        return event

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._ask("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    @property
    def name(self) -> str:
        """The product, for example ``NVIDIA H100 80GB HBM3``."""
        text = ctypes.create_string_buffer(256)
        self._ask("cuDeviceGetName", text, len(text), self._device)
        return text.value.decode()

    @property
    def capability(self) -> int:
        """Compute capability as one number: 90 for 9.0."""
        return 10 * self._attribute(_MAJOR) + self._attribute(_MINOR)

    @property
    def l2_bytes(self) -> int:
        """Size of the cache that all multiprocessors share."""
        return self._attribute(_L2_BYTES)

    @property
    def multiprocessors(self) -> int:
        """How many there are."""
        return self._attribute(_MULTIPROCESSORS)

    def wait(self) -> None:
        """Wait for everything that was launched."""
        self._ask("cuCtxSynchronize")

    def seconds(self, work: Call) -> float:
        """Do the work, wait for its end, and return what it took on the GPU."""
        # No stream is the default one, which TVM, PyTorch and CuPy launch on.
        self._ask("cuEventRecord", self._begin, None)
        work()
        self._ask("cuEventRecord", self._end, None)
        self._ask("cuEventSynchronize", self._end)
        milliseconds = ctypes.c_float()
        self._ask("cuEventElapsedTime", ctypes.byref(milliseconds), self._begin, self._end)
        return milliseconds.value * 1e-3


def repeated(calls: Sequence[Call], turns: int) -> Call:
    """Take the calls in turn, all of them `turns` times."""

    def work() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    return work


def turns_for(calls: Sequence[Call], clock: Clock) -> int:
    """Warm up, and tell how often all calls have to be taken for one sample."""
    spent, once = 0.0, math.inf
    while spent < WARM_UP:
        once = clock.seconds(repeated(calls, 1))
        spent += max(once, 1e-6)
    return max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-7)))


def quick_look(calls: Sequence[Call], clock: Clock) -> float:
    """Return the seconds of one call, roughly: the least of a few samples."""
    turns = turns_for(calls, clock)
    return min(clock.seconds(repeated(calls, turns)) for _ in range(_LOOKS)) / turns / len(calls)


def interleaved(
    systems: Mapping[str, Sequence[Call]], clock: Clock, rounds: int = ROUNDS
) -> dict[str, Spread]:
    """Time one call of each system, in rounds of rotating order.

    A system's calls do the same work on buffers of their own, so that none finds in the caches what
    it left there the time before.

    Returns
    -------
    dict of str to Spread
        Microseconds a call: what the GPU does, and what launching keeps it waiting for.
    """
    names = list(systems)
    turns = {name: turns_for(systems[name], clock) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            calls = systems[name]
            clock.seconds(repeated(calls, 1))
            total = clock.seconds(repeated(calls, turns[name]))
            times[name].append(total / turns[name] / len(calls))
    return {name: Spread.of(samples) for name, samples in times.items()}


def rotation_for(bytes_each: int, cache: int, fewest: int = 2, most: int = 64) -> int:
    """Tell how many sets of buffers are together three times as large as a cache."""
    return max(fewest, min(most, math.ceil(3 * cache / max(bytes_each, 1))))


def clocks() -> dict[str, str]:
    """Ask nvidia-smi for clocks, power and temperature as they are now; empty without it."""
    asked = (
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.draw",
        "power.limit",
        "temperature.gpu",
        "driver_version",
    )
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.strip().split(",")
    return dict(zip(asked, (value.strip() for value in values), strict=False))
