"""What kernels for tensor cores cost a GPU: events from what tiles need, see `cost`.

Beside what every kernel does, they keep tensor cores busy and fetch the activations of every tile
of rows from L2, as often as there are tiles.
"""

from __future__ import annotations

import math

from ...profile import SparsityProfile, TileFit
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from .cost import Events, columns_of, input_elements
from .pixel_rows import reads_pixels_in_order
from .tensor_tiles import STEPS, TensorShape
from .threads import WARP

# Registers beside sums and fragments, as nvcc 13 keeps them: any thread's, those of a piece that it
# copies, and of an element that comes by way of a register.
_OTHER_REGISTERS, _COPY_REGISTERS, _ELEMENT_REGISTERS = 40, 2, 3
# Warp instructions of a warp's step beside its loads and multiplications.
_STEP_OVERHEAD = 8
# Of an element that comes by way of registers, and of a result.
_ELEMENT_INSTRUCTIONS, _RESULT_INSTRUCTIONS = 14, 8


def needed_columns(
    profile: SparsityProfile, shape: TensorShape
) -> tuple[dict[str, float], TileFit]:
    """Estimate the columns of each part that all tiles of rows list together."""
    fit = profile.tile(shape.mt)
    in_runs = shape.run != 1
    columns = fit.run_columns if in_runs else fit.columns
    full = fit.full_run_columns if in_runs else fit.full_columns
    needed: dict[str, float]
    if shape.parts == ("dense",):
        needed = {"dense": columns}
    elif shape.parts == ("sparse",):
        needed = {"sparse": columns * fit.listed[in_runs]}
    else:
        needed = {"dense": full, "sparse": (columns - full) * fit.rest_listed[in_runs]}
    # The last chunk of each tile is filled up.
    filling = fit.tiles * shape.kb / 2
    return {part: count + min(count, filling) for part, count in needed.items()}, fit


def tensor_registers(shape: TensorShape, width: int) -> int:
    """Estimate a thread's registers; `width` is how many elements come as one."""
    halves = STEPS[shape.parts[-1]] // 16
    fragments = shape.mf * 4 + shape.nf * 2 * halves
    pieces = shape.kb * shape.nt // (width * shape.warps * WARP)
    coming = pieces * (_ELEMENT_REGISTERS if width == 1 else _COPY_REGISTERS)
    return _OTHER_REGISTERS + 4 * shape.mf * shape.nf + fragments + coming


def tensor_at_once(machine: CudaMachine, shape: TensorShape, width: int) -> int:
    """Count the blocks that a multiprocessor holds at once; 0 when one does not fit."""
    if shape.memory_bytes > machine.block_shared_bytes:
        return 0
    threads = shape.warps * WARP
    # Registers are given to warps in units of eight a thread, and a thread has 255 at most.
    registers = -(-tensor_registers(shape, width) // 8) * 8
    if registers > 255:
        return 0
    by_shared = machine.shared_bytes // (shape.memory_bytes + 1024)
    return min(
        by_shared, machine.registers // (threads * registers), machine.max_threads // threads
    )


def tensor_events(
    workload: Workload,
    machine: CudaMachine,
    profile: SparsityProfile,
    shape: TensorShape,
    width: int,
) -> Events:
    """Count what a kernel does.

    Returns
    -------
    mapping
        As of `cost.row_tiles_events`, with ``tensor`` (multiply-adds at the rate of dense ones),
        ``l2_bytes`` and ``launches`` in the place of ``fma``.
    """
    needed, fit = needed_columns(profile, shape)
    listed = sum(needed.values())
    tiles = max(1, fit.tiles)
    grids = _tiles_of_columns(workload, shape.nt)
    steps = {part: count / STEPS[part] * grids for part, count in needed.items()}
    tensor = sum(steps[part] * 16 * shape.mt * shape.nt for part in needed)
    # Wavefronts of 128 bytes: fragments that warps read, and chunks that come.
    weight = shape.warps_n * shape.mt / 16 * 4
    activations = shape.warps_m * shape.nt / 8 * 2
    read = sum(n * (weight + activations * STEPS[part] / 16) for part, n in steps.items())
    staged = listed * grids * shape.nt * 2 / 128 * (2 if width == 1 else 1)
    staged += sum(n * shape.mt / 16 * 4 for n in steps.values())
    results = columns_of(workload) * shape.rows / WARP
    mmas = sum(n * shape.mt / 16 * shape.nt / 8 for n in steps.values())
    loads = sum(
        n * (shape.mt / 16 * shape.warps_n + shape.nt / 16 * shape.warps_m) for n in steps.values()
    )
    copies = (
        listed * grids * shape.nt / (width * WARP) * (_ELEMENT_INSTRUCTIONS if width == 1 else 4)
    )
    overhead = sum(n * shape.warps * _STEP_OVERHEAD / shape.warps_k for n in steps.values())
    gathered = 2.0 * listed * grids * shape.nt + 4.0 * sum(
        n * shape.mt / 16 * 128 for n in steps.values()
    )
    packed = sum(needed[part] * shape.mt * 32 / STEPS[part] for part in needed)
    moved = 2.0 * (input_elements(workload) + columns_of(workload) * shape.rows) + packed
    turned = _turned_bytes(workload, shape)
    return {
        "tensor": tensor,
        "shared": read + staged + 2 * results,
        "issue": mmas + loads + copies + overhead + _RESULT_INSTRUCTIONS * results,
        "l2_bytes": gathered + turned,
        "bytes": moved + turned,
        "blocks": float(tiles * grids),
        "at_once": float(tensor_at_once(machine, shape, width)),
        "warps": float(shape.warps),
        "launches": 2.0 if turned else 1.0,
    }


def _turned_bytes(workload: Workload, shape: TensorShape) -> float:
    """Count what the launch that turns tokens writes; it is read again from L2."""
    geometry = workload.geometry
    is_turned = (
        isinstance(geometry, MatmulGeometry) and geometry.layout == "rows" and shape.run == 1
    )
    return 2.0 * input_elements(workload) if is_turned else 0.0


def _tiles_of_columns(workload: Workload, nt: int) -> int:
    geometry = workload.geometry
    if isinstance(geometry, Conv2dGeometry):
        images = columns_of(workload) // geometry.pixels
        return images * math.ceil(geometry.pixels / nt)
    return math.ceil(columns_of(workload) / nt)


def elements_at_once(workload: Workload, shape: TensorShape) -> int:
    """Tell how many elements of the activations come as one."""
    from .gathered_columns import copied_at_once

    geometry = workload.geometry
    if isinstance(geometry, Conv2dGeometry):
        return copied_at_once(geometry.pixels) if reads_pixels_in_order(geometry) else 1
    assert geometry is not None
    return copied_at_once(geometry.n) if geometry.layout == "features" else 8
