"""What kernels for tensor cores cost a GPU: events from what tiles need, see `cost`.

Beside what every kernel does, they keep tensor cores busy and fetch the activations of every tile
of rows from L2, as often as there are tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...formats.tensor_tiles import STEP_BYTES
from ...profile import SparsityProfile, TileFit
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from .cost import Events, columns_of, input_elements
from .gathered_columns import copied_at_once
from .pixel_rows import reads_pixels_in_order
from .tensor_tiles import UNIT_BYTES, TensorShape
from .threads import WARP

# Registers beside sums and fragments, as nvcc 13 keeps them: any thread's, those of a piece that it
# copies, and of an element that comes by way of a register.
_OTHER_REGISTERS, _COPY_REGISTERS, _ELEMENT_REGISTERS = 40, 2, 3
# Warp instructions of a warp's step beside its loads and multiplications.
_STEP_OVERHEAD = 8
# Of an element that comes by itself, and of a result.
_ELEMENT_INSTRUCTIONS, RESULT_INSTRUCTIONS = 14, 8
# Multiply-adds of 16-bit elements that take tensor cores as long as one instruction of any type,
# instructions of a product of fragments, and of splitting a register of float32.
_MACS = 2048
_PRODUCTS = {2: 1, 4: 3}
_SPLIT_INSTRUCTIONS = {2: 0, 4: 4}


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


def tensor_registers(shape: TensorShape, width: int, others: int = _OTHER_REGISTERS) -> int:
    """Estimate a thread's registers; `width` is how many elements come as one.

    `others` are those beside sums and fragments.
    """
    fragments = shape.mf * 4 + shape.nf * 2 * _units(shape.parts[-1])
    if shape.element_bytes == 4:
        # Split rows, and one split fragment of columns at a time.
        fragments = shape.mf * 8 + 8
    pieces = shape.kb * shape.nt // (width * shape.warps * WARP)
    coming = pieces * (_ELEMENT_REGISTERS if width == 1 else _COPY_REGISTERS)
    return others + 4 * shape.mf * shape.nf + fragments + coming


def _units(part: str) -> int:
    return STEP_BYTES[part] // UNIT_BYTES


def tensor_at_once(
    machine: CudaMachine, shape: TensorShape, width: int, others: int = _OTHER_REGISTERS
) -> int:
    """Count the blocks that a multiprocessor holds at once; 0 when one does not fit."""
    if shape.memory_bytes > machine.block_shared_bytes:
        return 0
    threads = shape.warps * WARP
    # Registers are given to warps in units of eight a thread, and a thread has 255 at most.
    registers = -(-tensor_registers(shape, width, others) // 8) * 8
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
    size, columns = shape.element_bytes, columns_of(workload)
    grids = math.ceil(columns / shape.nt)
    # How often a tile's rows are multiplied by 8 columns, and by all of a tile.
    steps = {part: count * size / STEP_BYTES[part] for part, count in needed.items()}
    fragments = sum(steps.values()) * shape.mt / 16
    activations = size * sum(needed.values()) * shape.nt
    results = columns * shape.rows / WARP
    packed = 512.0 * fragments + 64.0 * steps.get("sparse", 0.0) * shape.mt / 16
    turned = _turned_bytes(workload, shape)
    return {
        "tensor": _MACS * _PRODUCTS[size] * fragments * grids * shape.nt / 8,
        "shared": grids * _wavefronts(shape, steps, activations, width) + 2 * results,
        "issue": grids * _instructions(shape, steps, activations, width)
        + RESULT_INSTRUCTIONS * results,
        "l2_bytes": grids * (activations + packed) + turned,
        "bytes": size * (input_elements(workload) + columns * shape.rows) + packed + turned,
        "blocks": float(max(1, fit.tiles) * grids),
        "at_once": float(tensor_at_once(machine, shape, width)),
        "warps": float(shape.warps),
        "launches": 2.0 if turned else 1.0,
    }


def _wavefronts(
    shape: TensorShape, steps: Mapping[str, float], activations: float, width: int
) -> float:
    """Count passes over shared memory's banks for a tile of columns: chunks come, and are read."""
    come = activations / 128 * (1 if width * shape.element_bytes >= 4 else 2)
    come += 4 * sum(steps.values()) * shape.mt / 16
    weight = shape.warps_n * shape.mt / 16 * 4
    return come + sum(
        count * (weight + shape.warps_m * shape.nt / 8 * 2 * _units(part))
        for part, count in steps.items()
    )


def _instructions(
    shape: TensorShape, steps: Mapping[str, float], activations: float, width: int
) -> float:
    """Count warp instructions for a tile of columns."""
    size = shape.element_bytes
    pieces = activations / (size * width * WARP)
    # Of single elements it is worked out where each lies, and whether it is there.
    count = pieces * (_ELEMENT_INSTRUCTIONS if width == 1 else 4)
    rows, fragments = shape.mt / 16, shape.nt / 8
    for part, number in steps.items():
        registers = 2 * _units(part)
        loads = rows * shape.warps_n + fragments * shape.warps_m / (1 if size == 4 else 2)
        if size == 4 and shape.run == 1:
            loads += fragments * shape.warps_m * (registers - 1)
        split = _SPLIT_INSTRUCTIONS[size] * (
            4 * rows * shape.warps_n + registers * fragments * shape.warps_m
        )
        overhead = shape.warps / shape.warps_k * _STEP_OVERHEAD
        count += number * (_PRODUCTS[size] * rows * fragments + loads + split + overhead)
    return count


def _turned_bytes(workload: Workload, shape: TensorShape) -> float:
    """Count what the launch that turns tokens writes; it is read again from L2."""
    geometry = workload.geometry
    is_turned = (
        isinstance(geometry, MatmulGeometry) and geometry.layout == "rows" and shape.run == 1
    )
    return shape.element_bytes * input_elements(workload) if is_turned else 0.0


def elements_at_once(workload: Workload, shape: TensorShape) -> int:
    """Tell how many elements of the activations come as one."""
    geometry = workload.geometry
    if isinstance(geometry, Conv2dGeometry):
        extent = geometry.pixels if reads_pixels_in_order(geometry) else None
        return copied_at_once(extent, shape.element_bytes)
    assert geometry is not None
    if geometry.layout == "features":
        return copied_at_once(geometry.n, shape.element_bytes)
    return shape.piece
