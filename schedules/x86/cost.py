"""What the x86 kernels cost, in cycles of one core: a roofline with the loops' overhead.

The coefficients were fitted to measurements by `benchmarks/fit_cost.py` and hold for wide
out-of-order cores (two FMA, two loads a cycle). They rank candidates; `core_gigahertz` scales them
to the machine at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ...profile import SparsityProfile
from ...targets import X86Machine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from ..base import Config
from .panel_kernel import split_columns

# Tokens or images assumed where the batch is symbolic.
SYMBOLIC_TOKENS = 128
SYMBOLIC_BATCH = 1


@dataclass(frozen=True)
class Coefficients:
    """Cycles per event.

    Attributes
    ----------
    fma : float
        One vector multiply-add with its broadcast operand in a register.
    nonzero : float
        Fetching one weight value, whatever the number of vectors it meets.
    column : float
        One column of a register tile: index, address, loop.
    loop : float
        One loop over the columns of a mask, with its mispredicted end.
    mask : float
        Looking at one mask, empty or not.
    tile : float
        Loading and storing one accumulator vector between blocks.
    pack, store : float
        Moving one vector of activations into a panel; of results out of it.
    gemv : float
        One vector multiply-add whose weight vector comes from L2 or memory.
    """

    fma: float = 0.52
    nonzero: float = 0.45
    column: float = 1.2
    loop: float = 9.0
    mask: float = 0.7
    tile: float = 1.6
    pack: float = 2.2
    store: float = 3.5
    gemv: float = 1.35


DEFAULT = Coefficients()


def core_gigahertz() -> float:
    """Clock that turns cycles into time where nothing was measured."""
    return 4.0


@dataclass(frozen=True)
class _Extent:
    """How many panels of activations a workload has, and how many vectors they hold."""

    panels: int
    vectors: int
    columns: int


def _extent(workload: Workload, lanes: int, nt: int) -> _Extent:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        columns, images = geometry.n or SYMBOLIC_TOKENS, 1
    else:
        assert geometry is not None
        columns = geometry.pixels
        images = (geometry.batch or SYMBOLIC_BATCH) * geometry.groups
    tiles = split_columns(columns, nt, lanes)
    return _Extent(
        images * tiles.total,
        images * (tiles.full * tiles.nt + tiles.rest * tiles.nt_rest),
        images * columns,
    )


def _movement(workload: Workload, lanes: int, extent: _Extent, rows: int, columns: int) -> float:
    """Cycles to pack activations and to store results."""
    c = DEFAULT
    packed = float(extent.vectors * columns)
    if isinstance(workload.geometry, Conv2dGeometry):
        # A copy of a short row of pixels moves fewer than `lanes` of them.
        fill = min(1.0, workload.geometry.out_width / lanes)
        pointwise = workload.geometry.kernel == (1, 1)
        packed *= c.pack * (0.5 if pointwise else 1.0) / max(fill, 0.4)
        return packed + extent.vectors * rows * 1.2
    return packed * c.pack + extent.vectors * rows * c.store


def _threads(workload: Workload, config: Config) -> int:
    return min(int(config.get("threads", 1)), workload.threads) or 1


def sparse_cycles(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> float:
    """Estimate the register-tiled kernel on one core."""
    c = DEFAULT
    rows, columns = profile.shape
    mr, kb, nt = int(config["mr"]), int(config["kb"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    panels, blocks = math.ceil(rows / mr), math.ceil(columns / kb)
    density = profile.density
    union, loops = _mask_statistics(round(density, 4), mr, min(kb, columns))
    groups = panels * blocks
    per_panel = (
        c.nonzero * profile.nnz
        + c.column * union * panels * columns
        + groups * (c.loop * loops + c.mask * (1 << mr))
    )
    per_vector = (
        c.fma * profile.nnz
        + 0.5 * union * panels * columns
        + (c.tile * groups * mr if blocks > 1 else 0.0)
    )
    work = extent.panels * per_panel + extent.vectors * per_vector
    return work + _movement(workload, machine.lanes, extent, rows, columns)


@lru_cache(maxsize=4096)
def _mask_statistics(density: float, mr: int, kb: int) -> tuple[float, float]:
    """Share of columns that a panel of `mr` rows touches, and nonempty masks in a block of `kb`.

    For independent nonzeros; clustering rows saves about an eighth of the columns (measured).
    """
    union = loops = 0.0
    for count in range(1, mr + 1):
        ways = math.comb(mr, count)
        chance = density**count * (1 - density) ** (mr - count)
        union += ways * chance
        loops += ways * (1 - math.exp(-kb * chance))
    return max(union * 0.88, density), loops


def dense_cycles(workload: Workload, machine: X86Machine, config: Config) -> float:
    """Estimate the dense panel kernel on one core."""
    assert workload.geometry is not None
    rows, columns = workload.geometry.weight_shape
    mr, nt = int(config["mr"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    groups = getattr(workload.geometry, "groups", 1)
    rows_per_group = rows // groups
    padded = math.ceil(rows_per_group / mr) * mr
    # Fewer than eight accumulators cannot hide the latency of a multiply-add.
    latency = max(1.0, 8 / (mr * nt))
    loads = (mr + nt) / (mr * nt)
    per_vector = padded * columns * max(0.5, loads / 2) * latency
    work = extent.vectors * per_vector * 1.04
    return work + _movement(workload, machine.lanes, extent, rows_per_group, columns)


def gemv_cycles(workload: Workload, machine: X86Machine) -> float:
    """Estimate the kernel for a handful of tokens, bound by reading the weight."""
    assert isinstance(workload.geometry, MatmulGeometry)
    g = workload.geometry
    vectors = math.ceil(g.m / machine.lanes) * g.k
    return vectors * max(DEFAULT.gemv, 0.55 * (g.n or SYMBOLIC_TOKENS))


def depthwise_cycles(workload: Workload, machine: X86Machine) -> float:
    """Estimate the depthwise kernel, bound by loads."""
    assert isinstance(workload.geometry, Conv2dGeometry)
    return 1.5 * workload.geometry.macs(SYMBOLIC_BATCH) / machine.lanes


def microseconds(cycles: float, workload: Workload, config: Config) -> float:
    """Turn cycles of one core into time on the threads that the configuration uses."""
    threads = _threads(workload, config)
    share = cycles / (threads * 0.93 if threads > 1 else 1)
    return share / (core_gigahertz() * 1e3) + (4.0 if threads > 1 else 0.0)
