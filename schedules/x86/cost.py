"""What the x86 kernels cost, in cycles of one core: how often each event happens, times its price.

The prices were fitted by `benchmarks/fit_cost.py`, which measures the kernels and solves for them,
for weights that are not in L1 or L2 and loops whose lengths the branch predictor has not seen, as
in a network. There is one table for cores that issue two vector multiply-adds and two vector loads
a cycle, and one for those that issue one of each because their data paths are half as wide as the
vector. They rank candidates on a machine, and `X86Machine.gigahertz` turns them into time there; a
machine that was calibrated has prices of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

from ...panels import split_evenly
from ...profile import SparsityProfile
from ...targets import X86Machine
from ...workload import Conv2dGeometry, Epilogue, Geometry, MatmulGeometry, Workload
from ..base import Config
from ..epilogue import LONG
from .pixel_tiles import pixel_tiles

# Tokens or images assumed where the batch is symbolic.
SYMBOLIC_TOKENS = 128
SYMBOLIC_BATCH = 1

# What a core reaches beside others.
_PARALLEL_EFFICIENCY = 0.93

_LAYOUTS: tuple[Literal["rows", "panels"], ...] = ("rows", "panels")

# Cycles that the sums across a row of layer norm take beside those down a column, a vector.
_NORM_CYCLES = 1.5

# Cycles of a vector moved between L2 and registers, and of a polynomial.
_MOVED_CYCLES = 1.0
_LONG_CYCLES = 6.0

# Transpositions of attention in rows, of queries, keys, values and the result: passes over memory.
_TURNS = 5.0

# Cycles from a multiply-add to the next one that needs its result.
_FMA_LATENCY = 4

# What a multiply-add of the gathered kernel takes where each value meets one vector of tokens only,
# and is waited for (112 and 290 us at 90 and 75 % of 2048 x 2048, one token, on Zen 5).
_UNSHARED = 1.7

# What a multiply-add takes beside the dense kernel's where a permutation comes before it.
_PERMUTED = 1.4

# Multiply-adds that could be issued while a column of the mask kernel waits for the one before it,
# which adds to the same accumulators: fewer than the latency says, since cores run ahead.
_COLUMN_CHAIN = 3

# Weights of a network that are as large as this one: what does not fit L3 together comes from
# memory every time.
_LAYERS_ALIKE = 8


@dataclass(frozen=True)
class Prices:
    """Cycles per event.

    Attributes
    ----------
    fma : float
        One vector multiply-add of the kernels that share loads between rows, or the wait for one.
    nonzero : float
        Fetching one weight value of the mask kernel, however many vectors it meets.
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
    spread : float
        Fetching one weight value of the sliced kernel and its column, however many vectors follow.
    scalar : float
        One nonzero of the sliced kernel for one token.
    slice : float
        One slice of rows: its loop, whose end is mostly foreseen.
    tile : float
        One accumulator vector loaded and stored between blocks.
    pack, copy : float
        One vector of activations put into a panel, by transposing or by copying.
    pad : float
        One vector of an image copied into its padded form.
    store, write : float
        One vector of results stored, by transposing or straight from the registers.
    turn : float
        One vector of results that the channel kernel transposes, out of the sums of all pixels.
    dense_fma : float
        One cycle of the dense kernel's multiply-adds, as its tile allows.
    channel_fma : float
        One such cycle of the channel kernel, whose weights are fetched ahead.
    gemv_fma : float
        One vector multiply-add of the kernel for a handful of tokens, its weight vector loaded.
    weight_line : float
        One cache line of a sparse weight: in a network they come from beyond L2, layer by layer.
    dense_line : float
        One cache line of a dense weight, met for the first time.
    gemv_line : float
        One cache line of a dense weight that several streams are read of at once.
    activation_line : float
        One cache line of activations that L2 has no room for.
    memory_line : float
        One cache line, of weights or activations, that L3 has no room for.
    unit : float
        One panel of activations begun.
    fork : float
        A parallel loop started and joined.
    """

    fma: float = 0.5
    nonzero: float = 0.364
    column: float = 0.553
    load: float = 0.263
    far_load: float = 0.37
    loop: float = 3
    surprise: float = 5
    mask: float = 0.555
    lone_fma: float = 0.73
    spread: float = 0.428
    scalar: float = 0.553
    slice: float = 10.5
    tile: float = 1.55
    pack: float = 3.18
    copy: float = 1.64
    pad: float = 4.41
    store: float = 3.02
    turn: float = 6
    write: float = 0.702
    dense_fma: float = 1.08
    channel_fma: float = 1.0
    gemv_fma: float = 1.26
    weight_line: float = 0.454
    dense_line: float = 7.8
    gemv_line: float = 4.79
    activation_line: float = 1.13
    memory_line: float = 15
    unit: float = 20
    fork: float = 4000


# By vector multiply-adds a cycle; those for two were fitted to vectors of 256 bits.
PRICES: dict[int, Prices] = {
    2: Prices(),
    1: Prices(
        fma=0.5,
        nonzero=0.507,
        column=0.1,
        load=0.574,
        far_load=0.732,
        loop=3,
        surprise=16.6,
        mask=0.58,
        lone_fma=1.17,
        spread=0.624,
        scalar=0.832,
        slice=7.74,
        tile=3.64,
        pack=3.03,
        copy=2.86,
        pad=8.61,
        store=3.49,
        turn=6.5,
        write=0.7,
        dense_fma=1.09,
        channel_fma=1.01,
        gemv_fma=1.28,
        weight_line=0.559,
        dense_line=10.4,
        gemv_line=4.05,
        activation_line=2.55,
        memory_line=19.8,
        unit=20,
    ),
}

# What the events of a kernel are about, for reports.
KINDS: dict[str, tuple[str, ...]] = {
    "multiply-adds": ("fma", "lone_fma", "dense_fma", "channel_fma", "gemv_fma", "scalar"),
    "fetching nonzeros": ("nonzero", "spread", "column"),
    "loading activations": ("load", "far_load", "activation_line"),
    "loops": ("loop", "surprise", "mask", "slice"),
    "reading the weight": ("weight_line", "dense_line", "gemv_line"),
    "memory": ("memory_line",),
    "packing and storing": ("pack", "copy", "pad", "store", "turn", "write", "tile", "unit"),
    "threads": ("fork",),
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


def binds(events: Events, machine: X86Machine) -> str:
    """Name what takes a kernel the longest, one of `KINDS`."""
    prices = prices_of(machine)
    times = {
        kind: sum(getattr(prices, name) * events.get(name, 0.0) for name in names)
        for kind, names in KINDS.items()
    }
    return max(times, key=lambda kind: times[kind])


def microseconds(events: Events, workload: Workload, machine: X86Machine, config: Config) -> float:
    """Turn events into time on the threads that the configuration uses."""
    threads = max(1, min(int(config.get("threads", 1)), workload.threads))
    one_core = cycles(events, machine) / (machine.gigahertz * 1e3)
    if threads == 1:
        return one_core
    fork = prices_of(machine).fork / (machine.gigahertz * 1e3)
    return one_core / (threads * _PARALLEL_EFFICIENCY) + fork


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
    tiles = split_evenly(columns, nt, lanes)
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
    read, written = _activation_bytes(extent.vectors * lanes, geometry)
    activations = read + written
    # What is written was read before, and goes back. Half of L3: others live there, too.
    beyond = max(0.0, 1 - machine.l3_bytes / 2 / activations)
    moved = {
        "unit": float(extent.panels),
        "activation_line": max(0.0, activations - machine.l2_bytes) / 64,
        "memory_line": (read + 2 * written) * beyond / 64,
    }
    if isinstance(geometry, MatmulGeometry) and geometry.layout == "panels":
        return {**moved, "write": float(extent.vectors * rows)}
    if isinstance(geometry, MatmulGeometry):
        rounds = _rounds(machine)
        return {**moved, "pack": packed * rounds, "store": extent.vectors * rows * rounds}
    if geometry.kernel != (1, 1):
        # A copy ends with its row of pixels, so that short rows fill only part of a vector.
        packed /= max(
            0.3, min(1.0, geometry.out_width / (lanes * math.ceil(geometry.out_width / lanes)))
        )
    moved["pad"] = _padding_vectors(geometry, lanes)
    return {**moved, "copy": packed, "write": float(extent.vectors * (rows // geometry.groups))}


def _rounds(machine: X86Machine) -> float:
    """Tell what transposing a vector costs beside one of sixteen: rounds that exchange halves."""
    return max(1.0, math.log2(machine.lanes)) / 4 * _width(machine)


def panels_gain(workload: Workload, machine: X86Machine, config: Config) -> float:
    """Tell how many microseconds a matrix product saves that takes and gives panels."""
    assert isinstance(workload.geometry, MatmulGeometry)
    extent = _extent(workload, machine.lanes, int(config["nt"]))
    times = []
    for layout in _LAYOUTS:
        geometry = replace(workload.geometry, layout=layout)
        moved = _movement(
            replace(workload, geometry=geometry), machine, extent, int(config.get("parts", 1))
        )
        times.append(microseconds(moved, workload, machine, config))
    return times[0] - times[1]


def conversion_us(elements: int, machine: X86Machine) -> float:
    """Estimate what bringing activations into panels, or back, takes."""
    moved = {"pack": elements / machine.lanes * _rounds(machine), "unit": 1.0}
    return cycles(moved, machine) / (machine.gigahertz * 1e3)


def norm_gain(elements: int, machine: X86Machine) -> float:
    """Tell how many microseconds a layer norm saves that runs down panels."""
    return elements / machine.lanes * _NORM_CYCLES / (machine.gigahertz * 1e3)


def elementwise_us(chain: Epilogue, elements: int, machine: X86Machine) -> float:
    """Estimate what a chain of elementwise operators takes, in either layout."""
    long = sum(op.name in LONG for op in chain.ops)
    each = _MOVED_CYCLES * (1 + max(1, chain.tensors)) + len(chain.ops) + _LONG_CYCLES * long
    return elements / machine.lanes * each / (machine.gigahertz * 1e3)


def elementwise_gain(chain: Epilogue, tokens: int, features: int, machine: X86Machine) -> float:
    """Tell how many microseconds such a chain saves on panels: none.

    It loses what it computes for the tokens that fill the last vector.
    """
    filling = -tokens % machine.lanes
    return -elementwise_us(chain, filling * features, machine)


def attention_gain(elements: int, machine: X86Machine) -> float:
    """Tell how many microseconds attention saves on panels: heads are not turned and turned back.

    `elements` are those of its result.
    """
    return _TURNS * conversion_us(elements, machine)


def _width(machine: X86Machine) -> float:
    """Tell what a vector costs beside a full one: half data paths take narrow ones in one piece."""
    return 0.5 if machine.fma_per_cycle == 1 and machine.lanes < 16 else 1.0


def _activation_bytes(columns: int, geometry: Geometry) -> tuple[float, float]:
    """Count the bytes of activations that are read, and those that are written."""
    if isinstance(geometry, MatmulGeometry):
        return 4.0 * columns * geometry.k, 4.0 * columns * geometry.m
    images = 4.0 * (geometry.batch or SYMBOLIC_BATCH)
    read = geometry.in_channels * geometry.in_height * geometry.in_width
    return images * read, images * geometry.out_channels * geometry.pixels


def _padding_vectors(geometry: Conv2dGeometry, lanes: int) -> float:
    """Count the vectors that bring images into their padded form, split by phases of the stride."""
    if geometry.kernel == (1, 1) and geometry.strides == (1, 1) and not any(geometry.padding):
        return 0.0
    rows = (geometry.batch or SYMBOLIC_BATCH) * geometry.in_channels * geometry.in_height
    phases = geometry.strides[1]
    return float(rows * phases * math.ceil(geometry.in_width / phases / lanes))


def sparse_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the register-tiled kernel."""
    rows, columns = profile.shape
    mr, kb, nt = int(config["mr"]), int(config["kb"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    panels, blocks = math.ceil(rows / mr), math.ceil(columns / kb)
    alike = _chance_likeness(rows, columns)
    masks = _masks(round(profile.density, 4), round(max(alike, _likeness(profile)), 3), mr)
    groups = panels * blocks
    loops = groups * masks.loops(min(kb, columns))
    touched = masks.touched * panels * columns
    vectors = extent.vectors / extent.panels
    multiplied = masks.expected(lambda held: max(held * vectors, _COLUMN_CHAIN))
    packed = 4 * profile.nnz + 2 * touched + 2 * groups * (1 << mr)
    far = _far(min(kb, columns), nt, packed / groups, machine)
    return _together(
        _movement(workload, machine, extent, int(config.get("parts", 1))),
        _lines("weight_line", packed / 64, extent.panels, machine),
        _as_issued(
            {
                "fma": extent.panels * panels * columns * multiplied,
                "nonzero": float(extent.panels * profile.nnz),
                "column": extent.panels * touched,
                "load": extent.vectors * touched,
                "far_load": extent.vectors * touched * far,
                "loop": extent.panels * loops,
                "surprise": loops * _unforeseen(loops, extent.panels),
                "mask": float(extent.panels * (groups << mr)),
                "tile": float(extent.vectors * groups * mr if blocks > 1 else 0),
            },
            extent.vectors * profile.nnz,
            machine,
        ),
    )


def sliced_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the sliced kernel."""
    rows, columns = profile.shape
    mr, kb, nt = int(config["mr"]), int(config["kb"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    slices, blocks = math.ceil(rows / mr), math.ceil(columns / kb)
    groups = slices * blocks
    shared = _shared_by_pairs(profile, min(kb, columns)) if config["share"] == 2 else 0.0
    both = shared * profile.nnz
    # Rows of a slice are as long as its longest: few rows differ more from their neighbours.
    alone = (1 - shared + 5 / rows) * profile.nnz
    packed = 4 * profile.nnz + 2 * (alone + both / 2) + (12 + 4 * mr) * groups
    counted: dict[str, float] = {"slice": float(extent.panels * groups)}
    if machine.lanes == 1:
        # The more rows, the more of their values and activations the compiler gathers at once.
        counted["scalar"] = extent.vectors * alone * (16 / mr) ** 0.8
    else:
        width = _width(machine)
        waiting = max(1.0, 2 * _FMA_LATENCY * 0.6 / (mr * nt)) * width
        counted["lone_fma"] = extent.vectors * alone * waiting
        counted["fma"] = extent.vectors * both * waiting
        counted["load"] = extent.vectors * both / 2 * width
        far = _far(min(kb, columns), nt, packed / groups, machine)
        counted["far_load"] = extent.vectors * (alone + both / 2) * far * width
        counted["spread"] = extent.panels * (alone + both)
        counted["tile"] = extent.vectors * groups * mr * width if blocks > 1 else 0.0
    return _together(
        _movement(workload, machine, extent, int(config.get("parts", 1))),
        _lines("weight_line", packed / 64, extent.panels, machine),
        _as_issued(counted, extent.vectors * profile.nnz * _width(machine), machine),
    )


def gathered_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the kernel of panels over the columns that they need."""
    rows, columns = profile.shape
    mr, kb, nt = int(config["mr"]), int(config["kb"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    groups = math.ceil(rows / mr) * math.ceil(columns / kb)
    listed = _listed_columns(profile, mr)
    cycles_each = max(1 / machine.fma_per_cycle, (mr + nt) / (mr * nt) / 2)
    waiting = max(1.0, _FMA_LATENCY * machine.fma_per_cycle / (mr * nt))
    if extent.vectors == 1:
        waiting *= _UNSHARED
    packed = 4 * listed * mr + 2 * listed + 6 * groups
    far = _far(min(kb, columns), nt, packed / groups, machine)
    return _together(
        _movement(workload, machine, extent, int(config.get("parts", 1))),
        _lines("weight_line", packed / 64, extent.panels, machine),
        {
            "dense_fma": extent.vectors * listed * mr * cycles_each * waiting,
            "column": extent.panels * listed,
            "far_load": extent.vectors * listed * far,
            "loop": float(extent.panels * groups),
            "surprise": groups * _unforeseen(groups, extent.panels),
            "tile": float(extent.vectors * groups * mr if columns > kb else 0),
        },
    )


def _listed_columns(profile: SparsityProfile, mr: int) -> float:
    """Count the columns that panels of `mr` rows need, all together.

    Rows without a nonzero are left out, so that tiles that skip them may need fewer than blocks
    that stand where they are.
    """
    tall = profile.tile(16).columns
    aligned = {4: (4, 1), 8: (8, 1), 16: (16, 1)}
    if mr in aligned:
        return float(min(profile.block(*aligned[mr]).occupied, tall * 16 // mr))
    masks = _masks(round(profile.density, 4), round(_likeness(profile), 3), mr)
    return masks.touched * math.ceil(profile.shape[0] / mr) * profile.shape[1]


def _as_issued(counted: dict[str, float], multiplied: float, machine: X86Machine) -> Events:
    """Add what is missing to the cycles in which the dense kernel issues so many multiply-adds.

    Where nonzeros are few, multiply-adds hide behind all else that they need, and are cheap; a
    weight with hardly any zeros is bound by them.
    """
    prices = prices_of(machine)
    issued = multiplied / machine.fma_per_cycle * prices.dense_fma
    missing = issued - cycles(counted, machine)
    if missing <= 0:
        return counted
    return _together(counted, {"fma": missing / prices.fma})


# Loop ends that a branch predictor remembers, half of them, from one panel of activations to the
# next.
_REMEMBERED_LOOPS = 16384


def _unforeseen(loops: float, panels: int) -> float:
    """Tell how often the end of a loop is mispredicted while `panels` run the same `loops`.

    The first panel meets every length for the first time; the next ones repeat them, and the
    predictor knows as many as it can remember.
    """
    return 1 + (panels - 1) * loops / (loops + _REMEMBERED_LOOPS)


def _far(kb: int, nt: int, piece: float, machine: X86Machine) -> float:
    """Share of the loads of a block of activations that L1 does not serve.

    The `piece` bytes of a weight that a panel of rows reads pass through L1 as well.
    """
    room = max(0.0, machine.l1_bytes - piece)
    return max(0.0, 1 - room / (4 * kb * nt * machine.lanes))


def _lines(name: str, lines: float, panels: int, machine: X86Machine) -> dict[str, float]:
    """Count the cache lines of a weight that come from beyond L2: once, or for every panel."""
    fetched = lines * (panels if lines * 64 > machine.l2_bytes else 1)
    return _by_level(name, fetched, lines, machine)


def _by_level(name: str, fetched: float, lines: float, machine: X86Machine) -> dict[str, float]:
    """Tell the lines that L3 holds from those that it does not, a network's layers being alike."""
    together = _LAYERS_ALIKE * lines * 64
    beyond = max(0.0, 1 - machine.l3_bytes / together) if together else 0.0
    return {name: fetched * (1 - beyond), "memory_line": fetched * beyond}


def _together(*parts: Mapping[str, float]) -> dict[str, float]:
    """Add up counts of the same event."""
    total: dict[str, float] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0.0) + count
    return total


@dataclass(frozen=True)
class _Masks:
    """How the columns of a panel of rows are distributed over the sets of rows that they touch.

    `shares[k]` is the share of columns with `k` nonzeros, each of their masks being as likely.
    """

    shares: tuple[float, ...]

    @property
    def touched(self) -> float:
        """Share of columns with a nonzero."""
        return 1 - self.shares[0]

    def expected(self, value: Callable[[int], float]) -> float:
        """Average over the columns with nonzeros, zero for the others."""
        return sum(share * value(held) for held, share in enumerate(self.shares) if held)

    def loops(self, columns: int) -> float:
        """Return how many masks to expect in a block of so many columns."""
        mr, total = len(self.shares) - 1, 0.0
        for held in range(1, mr + 1):
            ways = math.comb(mr, held)
            total += ways * (1 - math.exp(-columns * self.shares[held] / ways))
        return total


# Correlation of rows that are the same; at 1 the distribution has no density.
_IDENTICAL = 0.999


@lru_cache(maxsize=4096)
def _masks(density: float, likeness: float, mr: int) -> _Masks:
    """Distribute nonzeros over panels of rows that are alike.

    Beta-binomial: `likeness` is the correlation of two rows of a panel in a column.
    """
    if not 0 < density < 1:
        return _Masks((*(1.0 - density,), *([0.0] * (mr - 1)), density))
    spread = 1 / min(max(likeness, 1e-3), _IDENTICAL) - 1
    a, b = density * spread, (1 - density) * spread
    return _Masks(
        tuple(
            math.comb(mr, held) * math.exp(_log_beta(held + a, mr - held + b) - _log_beta(a, b))
            for held in range(mr + 1)
        )
    )


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _chance_likeness(rows: int, columns: int) -> float:
    """Correlation that a search among many rows finds by chance: the fewer columns, the more.

    The overlap of two rows spreads as one over the root of the columns, and the largest of many
    such numbers lies that many logarithms out; the factor was measured.
    """
    return min(0.6, 0.66 * math.sqrt(2 * math.log(max(rows, 2)) / columns))


def _likeness(profile: SparsityProfile) -> float:
    """Correlation of neighbouring rows, as blocks of four of them tell it."""
    if profile.shape[0] < 4:
        return 0.0
    return _likeness_of(round(profile.density, 4), round(profile.block(4, 1).occupancy, 4))


@lru_cache(maxsize=4096)
def _likeness_of(density: float, occupancy: float) -> float:
    """Find the correlation at which four rows touch that share of the columns."""
    low, high = 0.0, _IDENTICAL
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _masks(density, middle, 4).touched > occupancy else (low, middle)
        )
    return low


# Rows of about the same number of nonzeros among which the sliced format seeks pairs.
_PAIR_WINDOW = 64


def _shared_by_pairs(profile: SparsityProfile, columns: int) -> float:
    """Share of the nonzeros that a row has in common with its partner in a block of `columns`.

    The more rows, the more even are those of a window; how much that helps was measured.
    """
    rows, density = profile.shape[0], profile.density
    found = max(0.1, 0.115 * math.log2(rows) - 0.36) if rows > 1 else 0.0
    chance = found * math.sqrt(2 * math.log(_PAIR_WINDOW) / columns)
    likeness = max(min(0.5, chance), _likeness(profile))
    return density + (1 - density) * likeness


def dense_events(workload: Workload, machine: X86Machine, config: Config) -> Events:
    """Count the events of the dense panel kernel."""
    assert workload.geometry is not None
    rows, columns = workload.geometry.weight_shape
    mr, nt = int(config["mr"]), int(config["nt"])
    extent = _extent(workload, machine.lanes, nt)
    groups = getattr(workload.geometry, "groups", 1)
    padded = math.ceil(rows // groups / mr) * mr
    # Two loads a cycle, and too few accumulators cannot hide the latency of a multiply-add.
    cycles_each = max(1 / machine.fma_per_cycle, (mr + nt) / (mr * nt) / 2)
    waiting = max(1.0, _FMA_LATENCY * machine.fma_per_cycle / (mr * nt))
    lines = groups * padded * columns / 16
    return _together(
        _movement(workload, machine, extent, int(config.get("parts", 1))),
        # Later panels read it while they multiply.
        _by_level("dense_line", lines, lines, machine),
        {"dense_fma": extent.vectors * padded * columns * cycles_each * waiting},
    )


# What registers that run short cost the channel kernel, by vector registers.
_SPILLING: dict[int, float] = {32: 1.0, 16: 1.12}


def channel_events(workload: Workload, machine: X86Machine, config: Config) -> Events:
    """Count the events of the channel kernel.

    It fetches weights while it multiplies: the longer of the two counts.
    """
    geometry, prices = workload.geometry, prices_of(machine)
    assert geometry is not None
    rows, columns = geometry.weight_shape
    groups = getattr(geometry, "groups", 1)
    images = (geometry.batch or SYMBOLIC_BATCH) if isinstance(geometry, Conv2dGeometry) else 1
    vectors, lanes = int(config["mr"]) // machine.lanes, machine.lanes
    panels = groups * math.ceil(rows // groups / int(config["mr"]))
    blocks = math.ceil(columns / int(config["kb"]))
    tiles = pixel_tiles(geometry, int(config["pixels"]))
    sums = images * panels * tiles.height * tiles.width * vectors
    steps = images * panels * columns * _uneven(panels // groups, int(config["threads"]))
    multiplied = steps * sum(
        count * _step_cycles(pixels, vectors, machine) for pixels, count in tiles.sizes()
    )
    lines = panels * columns * vectors * lanes / 16
    read = _by_level("gemv_line", images * lines, lines, machine)
    reading = sum(getattr(prices, name) * count for name, count in read.items())
    left = max(0.0, 1 - multiplied * prices.channel_fma / reading)
    return _together(
        {name: count * left for name, count in read.items()},
        {
            "channel_fma": multiplied,
            "tile": float(sums * blocks),
            "unit": float(images * panels * blocks * tiles.total),
        },
        _channel_movement(workload, machine, images * panels * vectors),
    )


def compact_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the channel kernel on the channels that are left."""
    geometry = workload.geometry
    assert geometry is not None
    rows = max(1, profile.shape[0] - profile.empty_rows)
    channels = max(1, profile.shape[1] // profile.taps - profile.empty_channels)
    smaller: Geometry
    if isinstance(geometry, MatmulGeometry):
        smaller = replace(geometry, m=rows, k=channels)
        vectors = (geometry.n or SYMBOLIC_TOKENS) * math.ceil(geometry.m / machine.lanes)
        # Sums are loaded and spread beside being stored.
        spreading = {"tile": float(vectors), "write": float(vectors)}
    else:
        smaller = replace(geometry, in_channels=channels, out_channels=rows)
        images = geometry.batch or SYMBOLIC_BATCH
        runs = math.ceil(geometry.pixels / machine.lanes)
        spreading = {"write": float(images * runs * profile.empty_rows)}
    left = replace(workload, geometry=smaller)
    return _together(channel_events(left, machine, config), spreading)


def _uneven(pieces: int, threads: int) -> float:
    """Tell how much longer threads work that cannot share `pieces` evenly."""
    return math.ceil(pieces / threads) * threads / pieces


def _step_cycles(pixels: int, vectors: int, machine: X86Machine) -> float:
    """Cycles in which one tap meets a register tile: multiply-adds, loads, or the latency."""
    multiplied, loaded = pixels * vectors / machine.fma_per_cycle, (pixels + vectors) / 2
    return _SPILLING[machine.registers] * max(multiplied, loaded, _FMA_LATENCY)


def _channel_movement(workload: Workload, machine: X86Machine, vectors: int) -> dict[str, float]:
    """Count what pads images and stores `vectors` of results for each pixel or token."""
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return {"write": float(vectors * (geometry.n or SYMBOLIC_TOKENS))}
    assert geometry is not None
    runs = math.ceil(geometry.pixels / machine.lanes) * machine.lanes
    padded = _padding_vectors(geometry, machine.lanes)
    return {"pad": padded, "turn": vectors * runs * _rounds(machine)}


def gemv_events(workload: Workload, machine: X86Machine) -> Events:
    """Count the events of the kernel for a handful of tokens."""
    assert isinstance(workload.geometry, MatmulGeometry)
    g = workload.geometry
    vectors = math.ceil(g.m / machine.lanes) * g.k
    return _streamed(workload, machine, vectors, vectors * machine.lanes / 16, 1.0)


def n_of_m_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Events:
    """Count the events of the same kernel on the slots of an N:M weight."""
    assert isinstance(workload.geometry, MatmulGeometry)
    g, m = workload.geometry, int(config["m"])
    bits = math.log2(m)
    vectors = math.ceil(g.m / machine.lanes) * math.ceil(g.k / m) * _held_of(profile, m)
    lines = vectors * machine.lanes / 16 * (1 + bits / 32)
    return _streamed(workload, machine, vectors, lines, _PERMUTED)


def _held_of(profile: SparsityProfile, m: int) -> int:
    """Tell how many slots the fullest group of `m` columns needs, as far as was counted."""
    known = {fit.n * m // fit.m for fit in profile.nm if fit.holds and m % fit.m == 0}
    return min(known, default=m)


def _streamed(
    workload: Workload, machine: X86Machine, vectors: int, lines: float, each: float
) -> Events:
    """Count what multiplies weight vectors with a few tokens while every line is read once.

    The longer of the two counts; `each` is what a multiply-add takes beside the dense kernel's.
    """
    assert isinstance(workload.geometry, MatmulGeometry)
    prices = prices_of(machine)
    multiplied = each * vectors * (workload.geometry.n or SYMBOLIC_TOKENS)
    read = _by_level("gemv_line", lines, lines, machine)
    reading = sum(getattr(prices, name) * count for name, count in read.items())
    left = max(0.0, 1 - multiplied * prices.gemv_fma / reading)
    return {"gemv_fma": multiplied, **{name: n * left for name, n in read.items()}}


def depthwise_events(workload: Workload, machine: X86Machine) -> Events:
    """Count the events of the depthwise kernel, bound by loads."""
    assert isinstance(workload.geometry, Conv2dGeometry)
    each = 3 / machine.fma_per_cycle
    return {"dense_fma": each * workload.geometry.macs(SYMBOLIC_BATCH) / machine.lanes}
