"""The limits of one core, measured, and the time below which they let no kernel go."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from bars import library

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Where the system does not tell.
_USUAL = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}


@dataclass(frozen=True)
class Limits:
    """Rates of one core at one vector width, and its caches in bytes.

    Attributes
    ----------
    fma_gflops : float
        Multiply-adds between registers, counted as two.
    l1_gbytes, l2_gbytes, l3_gbytes, memory_gbytes : float
        Reading by whole vectors, in 1e9 bytes a second.
    """

    lanes: int
    fma_gflops: float
    l1_gbytes: float
    l2_gbytes: float
    l3_gbytes: float
    memory_gbytes: float
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int

    def reading(self, size: float) -> tuple[str, float]:
        """Name the nearest level that holds `size` bytes behind L1, and its rate."""
        if size <= self.l2_bytes:
            return "L2", self.l2_gbytes
        if size <= self.l3_bytes:
            return "L3", self.l3_gbytes
        return "memory", self.memory_gbytes


def measure_limits(lanes: int) -> Limits:
    """Measure this core."""
    lib, caches = library(lanes), {level: cache_bytes(level) for level in (1, 2, 3)}
    # Half of a cache: a whole one also holds other things.
    rates = [lib.limit_read_gbytes(caches[level] // 2) for level in (1, 2)]
    rates.append(lib.limit_read_gbytes(min(8 << 20, caches[3] // 2)))
    rates.append(lib.limit_read_gbytes(4 * caches[3]))
    rounded = [round(rate, 1) for rate in [lib.limit_fma_gflops(), *rates]]
    return Limits(lanes, *rounded, *caches.values())


def cache_bytes(level: int) -> int:
    """Return the size of this core's data cache of a level."""
    for entry in _CACHES.glob("index*"):
        try:
            if (entry / "level").read_text().strip() != str(level):
                continue
            if (entry / "type").read_text().strip() == "Instruction":
                continue
            return int((entry / "size").read_text().strip().rstrip("K")) << 10
        except (OSError, ValueError):
            continue
    return _USUAL[level]


@dataclass(frozen=True)
class Floors:
    """Microseconds that each limit asks for at least.

    Attributes
    ----------
    fma : float
        One multiply-add for every nonzero and column of the result.
    l1 : float
        One vector loaded for every multiply-add; register tiles share loads and go below.
    bytes : float
        Packed weight and activations read once from the nearest cache that holds them.
    memory : float
        The same from memory.
    binds : str
        The limit that `hot` is set by.
    hot : float
        What a hot call takes at least.
    """

    fma: float
    l1: float
    bytes: float
    memory: float
    packed_bytes: int
    activation_bytes: int
    binds: str
    hot: float


def floors(
    limits: Limits, nnz: int, columns: int, packed_bytes: int, activation_bytes: int
) -> Floors:
    """Return the floors of a sparse product of `nnz` nonzeros with `columns` columns."""
    total = packed_bytes + activation_bytes
    level, rate = limits.reading(total)
    fma = 2e-3 * nnz * columns / limits.fma_gflops
    by_bytes = total / rate * 1e-3
    return Floors(
        fma=round(fma, 3),
        l1=round(4e-3 * nnz * columns / limits.l1_gbytes, 3),
        bytes=round(by_bytes, 3),
        memory=round(total / limits.memory_gbytes * 1e-3, 3),
        packed_bytes=packed_bytes,
        activation_bytes=activation_bytes,
        binds="FMA" if fma >= by_bytes else level,
        hot=round(max(fma, by_bytes), 3),
    )


def as_dict(value: Limits | Floors) -> dict[str, float | int | str]:
    """Return the fields as plain data."""
    return asdict(value)
