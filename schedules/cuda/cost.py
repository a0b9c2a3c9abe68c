"""What a kernel costs a GPU: counted events, and the roofline that they are held against.

A kernel takes as long as the busiest of four things: float32 multiply-adds, shared memory
(128 bytes a cycle and multiprocessor), instructions issued (four warps a cycle), and memory. The
blocks that a multiprocessor holds at once hide each other's waiting; where it holds few, or the
last blocks leave most multiprocessors idle, time is lost in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...dtypes import HALF_TYPES
from ...formats.row_tiles import rounded_most
from ...profile import SparsityProfile
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from .row_tiles import TileIO, TileShape
from .threads import WARP

# Tokens and images that a kernel for any number of them is planned for.
SYMBOLIC_TOKENS = 128
SYMBOLIC_BATCH = 1

# Microseconds from a launch to the kernel's first instruction, and from its last to its end.
LAUNCH_US = 3.0
# Share of a limit that good kernels reach: what cuBLAS and cuDNN leave of the peak is as much.
REACHED = 0.8
# TVM's own schedules (dlight) against the peak of what they compute on: tensor cores for matrix
# products in float16, else the cores for float32.
_STOCK_REACHED = 0.5
_STOCK_REACHED_ON_TENSOR_CORES = 0.4
# From a request to memory to its answer, when many are under way.
_MEMORY_LATENCY_US = 0.6
# Warps that a multiprocessor needs to keep its pipes full.
_ENOUGH_WARPS = 16
_ENOUGH_TENSOR_WARPS = 8
_SHARED_BYTES_A_CYCLE = 128
_WARPS_ISSUED_A_CYCLE = 4
# Addresses, bounds and nonzeros on their way, as nvcc 13 keeps them.
_OTHER_REGISTERS = 48
# What the fullest tile of a random pattern has over the mean.
_FULLEST = 1.3

Events = Mapping[str, float]


def columns_of(workload: Workload) -> int:
    """Count the columns of activations: all tokens, or the pixels of all images."""
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return geometry.n or SYMBOLIC_TOKENS
    assert geometry is not None
    return geometry.pixels * (geometry.batch or SYMBOLIC_BATCH)


def shared_bytes(shape: TileShape, io: TileIO) -> int:
    """Count the shared memory of a block; TVM aligns its arrays to 64 bytes at most."""
    return 4 * (io.shared_floats + 2 * shape.most + shape.mt + 1) + 4 * 64


def expected_most(profile: SparsityProfile, mt: int, kb: int, step: int) -> int:
    """Guess how many nonzeros, padded to steps, the fullest tile has in a block."""
    mean = profile.density * mt * kb + mt * (step - 1) / 2
    most = min(mt * kb + mt * step, _FULLEST * mean + 4 * math.sqrt(mean) + step)
    return rounded_most(most)


def at_once(machine: CudaMachine, shape: TileShape, io: TileIO) -> int:
    """Count the blocks that a multiprocessor holds at once; 0 when one does not fit."""
    shared, threads = shared_bytes(shape, io), shape.warps * WARP
    sums = shape.mt // shape.warps * shape.nt
    registers = _OTHER_REGISTERS + sums + io.registers_a_column * shape.nt
    if shared > machine.block_shared_bytes:
        return 0
    # A block takes a kilobyte more than it asks for.
    by_shared = machine.shared_bytes // (shared + 1024)
    by_registers = machine.registers // (threads * registers)
    return min(by_shared, by_registers, machine.max_threads // threads, 32)


def row_tiles_events(
    workload: Workload, machine: CudaMachine, profile: SparsityProfile, shape: TileShape, io: TileIO
) -> Events:
    """Count what the kernel for unstructured weights does.

    Returns
    -------
    mapping
        ``fma``, ``shared`` (wavefronts of 128 bytes), ``issue`` (warp instructions), ``bytes``,
        ``blocks``, ``at_once`` (blocks a multiprocessor), ``warps``.
    """
    pieces = shape.tiles * shape.mt * shape.blocks
    nonzeros = profile.nnz + pieces * (shape.step - 1) / 2 * min(1.0, profile.density * shape.kb)
    grids = _grid_columns(workload, shape, io)
    vector_loads = shape.nt if isinstance(workload.geometry, Conv2dGeometry) else 1
    per_nonzero = shape.nt + 2 / shape.step
    staged = io.shared_floats / WARP * shape.blocks * shape.tiles
    moved = input_elements(workload) + columns_of(workload) * shape.rows + 1.5 * profile.nnz
    return {
        "fma": nonzeros * shape.nt * WARP * grids,
        "shared": (nonzeros * per_nonzero + 2 * staged) * grids,
        "issue": (nonzeros * (shape.nt + vector_loads + 4 / shape.step) + 8 * staged) * grids,
        "bytes": 4.0 * moved,
        "blocks": float(shape.tiles * grids),
        "at_once": float(at_once(machine, shape, io)),
        "warps": float(shape.warps),
    }


def input_elements(workload: Workload) -> int:
    """Count the elements of the activations."""
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return columns_of(workload) * geometry.k
    assert geometry is not None
    image = geometry.in_channels * geometry.in_height * geometry.in_width
    return image * (geometry.batch or SYMBOLIC_BATCH)


def output_elements(workload: Workload) -> int:
    """Count the elements of the result."""
    assert workload.geometry is not None
    return columns_of(workload) * workload.geometry.weight_shape[0]


def _grid_columns(workload: Workload, shape: TileShape, io: TileIO) -> int:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return -(-columns_of(workload) // shape.width)
    assert geometry is not None
    return int(io.grid()["y"]) * (geometry.batch or SYMBOLIC_BATCH)


def microseconds(events: Events, machine: CudaMachine) -> float:
    """Turn events into time; infinite where a block does not fit."""
    if not events["at_once"]:
        return math.inf
    cycles = max(_busy_cycles(events, machine).values())
    # Blocks that the busiest multiprocessor runs, over those that it would run of an even share.
    share = events["blocks"] / machine.multiprocessors
    uneven = math.ceil(share) / share
    together = min(events["at_once"], math.ceil(share))
    # On tensor cores a warp's next multiplications do not wait for its last ones.
    enough = _ENOUGH_TENSOR_WARPS if "tensor" in events else _ENOUGH_WARPS
    busy = min(1.0, together * events["warps"] / enough)
    computing = cycles / machine.multiprocessors * uneven / busy / (machine.gigahertz * 1e3)
    moving = max(_moving(events, machine).values())
    return LAUNCH_US * events.get("launches", 1.0) + max(computing / REACHED, moving)


def _busy_cycles(events: Events, machine: CudaMachine) -> dict[str, float]:
    """Return the cycles that all multiprocessors together spend, by what keeps them busy."""
    return {
        "multiply-adds": events.get("fma", 0.0) / machine.cores,
        "tensor cores": events.get("tensor", 0.0) / (machine.tensor_macs * machine.warp_share),
        "shared memory": events["shared"],
        "instructions": events["issue"] / _WARPS_ISSUED_A_CYCLE,
    }


def _moving(events: Events, machine: CudaMachine) -> dict[str, float]:
    """Return the microseconds that bytes take; L2's rate is one that was reached."""
    # Memory's rate needs so many bytes under way at a time (Little's law).
    sustained = events.get("in_flight", math.inf) / _MEMORY_LATENCY_US
    rate = min(machine.memory_gbytes * 1e3 * REACHED, sustained)
    return {
        "L2": events.get("l2_bytes", 0.0) / (machine.l2_gbytes * 1e3),
        "memory": events["bytes"] / rate,
    }


def binds(events: Events, machine: CudaMachine) -> str:
    """Name what takes a kernel the longest."""
    busy = {
        kind: cycles / machine.multiprocessors / (machine.gigahertz * 1e3 * REACHED)
        for kind, cycles in _busy_cycles(events, machine).items()
    }
    times = {**busy, **_moving(events, machine)}
    return max(times, key=lambda kind: times[kind])


def stock_microseconds(workload: Workload, machine: CudaMachine) -> float:
    """Estimate what TVM's own dense kernel takes."""
    geometry = workload.geometry
    assert geometry is not None
    macs = geometry.macs(SYMBOLIC_TOKENS if workload.op == "matmul" else SYMBOLIC_BATCH)
    per_cycle = machine.cores * _STOCK_REACHED
    if workload.op == "matmul" and workload.dtype == "float16":
        per_cycle = machine.tensor_macs * machine.warp_share * _STOCK_REACHED_ON_TENSOR_CORES
    rate = machine.multiprocessors * per_cycle * machine.gigahertz * 1e3
    rows, columns = geometry.weight_shape
    width = 2.0 if workload.dtype in HALF_TYPES else 4.0
    moved = width * (rows * columns + columns_of(workload) * rows)
    return LAUNCH_US + max(macs / rate, moved / (machine.memory_gbytes * 1e3))
