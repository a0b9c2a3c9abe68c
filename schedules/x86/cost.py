"""What the x86 kernels cost, in cycles of one core: how often each event happens, times its price.

The prices were fitted by `benchmarks/fit_cost.py`, which measures the kernels and solves for them,
for weights that are not in L1 or L2 and loops whose lengths the branch predictor has not seen, as
in a network. There is one table for cores that issue two vector multiply-adds and two vector loads
a cycle, and one for those that issue one of each because their data paths are half as wide as the
vector. They rank candidates on a machine, and `X86Machine.gigahertz` turns them into time there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from ...profile import SparsityProfile
from ...targets import X86Machine
from ...workload import Conv2dGeometry, Geometry, MatmulGeometry, Workload
from ..base import Config
from .panel_kernel import split_columns

# Tokens or images assumed where the batch is symbolic.
SYMBOLIC_TOKENS = 128
SYMBOLIC_BATCH = 1

# Starting and joining a parallel loop, and what a core reaches beside others.
_FORK_MICROSECONDS = 4.0
_PARALLEL_EFFICIENCY = 0.93


@dataclass(frozen=True)
class Prices:
    """Cycles per event.

    Attributes
    ----------
    fma : float
        One vector multiply-add of the sparse kernel.
    nonzero : float
        Fetching one weight value, however many vectors it meets.
    column : float
        One column of a register tile: its index, its address, its turn of the loop.
    load : float
        One vector of activations loaded for a column.
    far_load : float
        One such vector that was not in L1, since the block is longer than that.
    loop : float
        One loop over the columns of a mask, its end foreseen.
    surprise : float
        The end of such a loop that the branch predictor does not foresee.
    mask : float
        Looking at one mask, empty or not.
    lone_fma : float
        One vector multiply-add of the sliced kernel, with the load that it does not share.
    slice : float
        One slice of rows: its loop, whose end is mostly foreseen.
    tile : float
        One accumulator vector loaded and stored between blocks.
    pack, copy : float
        One vector of activations put into a panel, by transposing or by copying.
    store, write : float
        One vector of results stored, by transposing or straight from the registers.
    dense_fma : float
        One vector multiply-add of the dense kernel, as its tile allows.
    gemv_fma : float
        One vector multiply-add of the kernel for a handful of tokens, its weight vector loaded.
    weight_line : float
        One cache line of a sparse weight: in a network they come from beyond L2, layer by layer.
    activation_line : float
        One cache line of activations that L2 has no room for.
    dense_line : float
        One cache line of a dense weight, which there is little arithmetic to hide behind.
    unit : float
        One panel of activations begun.
    """

    fma: float = 0.5
    nonzero: float = 0.6
    column: float = 0.915
    load: float = 0.4
    far_load: float = 0.6
    loop: float = 3
    surprise: float = 0
    mask: float = 1.66
    lone_fma: float = 0.77
    slice: float = 7.58
    tile: float = 4.47
    pack: float = 2.32
    copy: float = 2.01
    store: float = 1.41
    write: float = 0.7
    dense_fma: float = 1.26
    gemv_fma: float = 0.5
    weight_line: float = 1.8
    activation_line: float = 0
    dense_line: float = 3.51
    unit: float = 20


# By vector multiply-adds a cycle. Those for two were fitted before `surprise` and `activation_line`
# were told apart from `loop` and from what packs and stores.
PRICES: dict[int, Prices] = {
    2: Prices(),
    1: Prices(
        fma=0.534,
        nonzero=0.355,
        column=0.723,
        load=0.352,
        far_load=1.19,
        loop=3,
        surprise=11.8,
        mask=0.5,
        lone_fma=1.01,
        slice=5,
        tile=4.86,
        pack=2.28,
        copy=3.16,
        store=1,
        write=0.866,
        dense_fma=2.11,
        gemv_fma=1.13,
        weight_line=0.1,
        activation_line=2.63,
        dense_line=3.73,
        unit=20,
    ),
}

PRICE_NAMES: tuple[str, ...] = tuple(field.name for field in fields(Prices))

Events = Mapping[str, float]


@lru_cache(maxsize=64)
def prices_of(machine: X86Machine) -> Prices:
    """Return what events cost on a machine: as calibrated there, else as the table says."""
    measured = {name: price for name, price in machine.prices if name in PRICE_NAMES}
    return replace(PRICES[machine.fma_per_cycle], **measured)


def cycles(events: Events, machine: X86Machine) -> float:
    """Sum up events by their prices."""
    prices = prices_of(machine)
    return sum(getattr(prices, name) * count for name, count in events.items())


def microseconds(events: Events, workload: Workload, machine: X86Machine, config: Config) -> float:
    """Turn events into time on the threads that the configuration uses."""
    threads = max(1, min(int(config.get("threads", 1)), workload.threads))
    one_core = cycles(events, machine) / (machine.gigahertz * 1e3)
    if threads == 1:
        return one_core
    return one_core / (threads * _PARALLEL_EFFICIENCY) + _FORK_MICROSECONDS


@dataclass(frozen=True)
class _Extent:
    """How many panels of activations a workload has, and how many vectors they hold."""

    panels: int
    vectors: int


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
        images * tiles.total, images * (tiles.full * tiles.nt + tiles.rest * tiles.nt_rest)
    )


def _movement(
    workload: Workload, machine: X86Machine, extent: _Extent, parts: int
) -> dict[str, float]:
    """Count what packs activations and stores results; every range of rows packs for itself."""
    geometry, lanes = workload.geometry, machine.lanes
    assert geometry is not None
    rows, columns = geometry.weight_shape
    packed = float(extent.vectors * columns * parts)
    far = {"activation_line": _far_activations(extent.vectors * lanes, geometry, machine)}
    if isinstance(geometry, MatmulGeometry):
        stored = float(extent.vectors * rows)
        return {"pack": packed, "store": stored, "unit": float(extent.panels), **far}
    stored = float(extent.vectors * (rows // geometry.groups))
    if geometry.kernel != (1, 1):
        # A copy ends with its row of pixels, so that short rows fill only part of a vector.
        packed /= max(
            0.3, min(1.0, geometry.out_width / (lanes * math.ceil(geometry.out_width / lanes)))
        )
    return {"copy": packed, "write": stored, "unit": float(extent.panels), **far}


def _far_activations(columns: int, geometry: Geometry, machine: X86Machine) -> float:
    """Count the lines of activations, read and written, that L2 cannot hold."""
    rows, features = geometry.weight_shape
    taps = math.prod(geometry.kernel) if isinstance(geometry, Conv2dGeometry) else 1
    return max(0.0, 4 * columns * (rows + features / taps) - machine.l2_bytes) / 64


def sparse_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the register-tiled kernel."""
    rows, columns = profile.shape
    mr, kb, nt = int(config["mr"]), int(config["kb"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    panels, blocks = math.ceil(rows / mr), math.ceil(columns / kb)
    union, loops = _mask_statistics(round(profile.density, 4), mr, min(kb, columns))
    groups = panels * blocks
    touched = union * panels * columns
    packed_lines = (4 * profile.nnz + 2 * touched + 2 * groups * (1 << mr)) / 64
    return {
        **_movement(workload, machine, extent, int(config.get("parts", 1))),
        "fma": float(extent.vectors * profile.nnz),
        "nonzero": float(extent.panels * profile.nnz),
        "column": extent.panels * touched,
        "load": extent.vectors * touched,
        "far_load": extent.vectors * touched * _far(min(kb, columns), nt, machine),
        "loop": extent.panels * groups * loops,
        "surprise": groups * loops * _unforeseen(groups * loops, extent.panels),
        "mask": float(extent.panels * (groups << mr)),
        "tile": float(extent.vectors * groups * mr if blocks > 1 else 0),
        "weight_line": _fetched(packed_lines, extent.panels, machine),
    }


def sliced_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the sliced kernel."""
    rows, columns = profile.shape
    mr, kb, nt = int(config["mr"]), int(config["kb"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    slices, blocks = math.ceil(rows / mr), math.ceil(columns / kb)
    groups = slices * blocks
    shared = _shared_by_pairs(profile.density, rows) if config["share"] == 2 else 0.0
    # Rows of a slice are as long as its longest: few rows differ more from their neighbours.
    alone = (1 - shared + 5 / rows) * profile.nnz
    packed_lines = (
        4 * profile.nnz + 2 * (alone + shared * profile.nnz / 2) + (12 + 4 * mr) * groups
    ) / 64
    # Fewer than eight accumulators cannot hide the latency of a multiply-add; scalars load faster.
    latency = max(1.0, 8 / (mr * nt) * 0.6)
    return {
        **_movement(workload, machine, extent, int(config.get("parts", 1))),
        "lone_fma": extent.vectors * alone * latency * (1.0 if machine.lanes > 1 else 0.5),
        "fma": extent.vectors * shared * profile.nnz * latency,
        "load": extent.vectors * shared * profile.nnz / 2,
        "far_load": extent.vectors
        * (alone + shared * profile.nnz / 2)
        * _far(min(kb, columns), nt, machine),
        "nonzero": float(extent.panels * profile.nnz),
        "slice": float(extent.panels * groups),
        "tile": float(extent.vectors * groups * mr if blocks > 1 else 0),
        "weight_line": _fetched(packed_lines, extent.panels, machine),
    }


# Loop ends that a branch predictor remembers from one panel of activations to the next.
_REMEMBERED_LOOPS = 8192


def _unforeseen(loops: float, panels: int) -> float:
    """Tell how often the end of a loop is mispredicted while `panels` run the same `loops`.

    The first panel meets every length for the first time; the next ones repeat them, and the
    predictor knows as many as it can remember.
    """
    return 1 + (panels - 1) * min(1.0, loops / _REMEMBERED_LOOPS)


def _far(kb: int, nt: int, machine: X86Machine) -> float:
    """Share of the loads of a block of activations that L1 does not serve."""
    return max(0.0, 1 - machine.l1_bytes / (4 * kb * nt * machine.lanes))


def _shared_by_pairs(density: float, rows: int) -> float:
    """Share of the nonzeros that a row has in common with its partner: measured, pairs of 64."""
    return min(1.0, max(0.1, 0.15 - 4 / rows) + 0.9 * density) if density < 1 else 1.0


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


def _fetched(lines: float, panels: int, machine: X86Machine) -> float:
    """Count the lines of weights that come from beyond L2: once, or again for every panel."""
    return lines * (panels if lines * 64 > machine.l2_bytes else 1)


def dense_events(workload: Workload, machine: X86Machine, config: Config) -> Events:
    """Count the events of the dense panel kernel."""
    assert workload.geometry is not None
    rows, columns = workload.geometry.weight_shape
    mr, nt = int(config["mr"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    rows //= getattr(workload.geometry, "groups", 1)
    padded = math.ceil(rows / mr) * mr
    # Fewer than eight accumulators cannot hide the latency of a multiply-add.
    latency = max(1.0, 8 / (mr * nt))
    loads = (mr + nt) / (mr * nt)
    return {
        **_movement(workload, machine, extent, int(config.get("parts", 1))),
        "dense_fma": extent.vectors * padded * columns * max(0.5, loads / 2) * latency,
        "dense_line": _fetched(padded * columns / 16, extent.panels, machine),
    }


def gemv_events(workload: Workload, machine: X86Machine) -> Events:
    """Count the events of the kernel for a handful of tokens.

    It reads every weight once, while it multiplies: the longer of the two counts.
    """
    assert isinstance(workload.geometry, MatmulGeometry)
    g, prices = workload.geometry, prices_of(machine)
    vectors = math.ceil(g.m / machine.lanes) * g.k
    multiplied, lines = vectors * (g.n or SYMBOLIC_TOKENS), vectors * machine.lanes / 16
    hidden = multiplied * prices.gemv_fma / prices.dense_line
    return {"gemv_fma": float(multiplied), "dense_line": max(0.0, lines - hidden)}


def depthwise_events(workload: Workload, machine: X86Machine) -> Events:
    """Count the events of the depthwise kernel, bound by loads."""
    assert isinstance(workload.geometry, Conv2dGeometry)
    return {"dense_fma": 1.5 * workload.geometry.macs(SYMBOLIC_BATCH) / machine.lanes}
