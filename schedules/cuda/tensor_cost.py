"""What kernels for tensor cores cost a GPU: events from what tiles need, see `cost`.

Beside what every kernel does, they keep tensor cores busy and fetch the activations of every tile
of rows from L2, as often as there are tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...formats.tensor_tiles import STEP_BYTES
from ...profile import SparsityProfile, TileFit
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from .cost import Events, columns_of, input_elements
from .gathered_columns import copied_at_once
from .pixel_rows import reads_pixels_in_order
from .tensor_tiles import UNIT_BYTES, TensorShape
from .threads import WARP

# Registers beside sums and fragments, as nvcc 13 keeps them.
_OTHER_REGISTERS = 64
# Warp instructions of a warp's step beside its loads and multiplications.
_STEP_OVERHEAD = 8
# Of an element that comes by way of registers, and of a result.
_ELEMENT_INSTRUCTIONS, _RESULT_INSTRUCTIONS = 14, 8
# Columns that `formats.tensor_tiles` lists to make a random pattern two of four, over those that
# have a nonzero, by density in them: for 16-bit elements or float32, single columns or runs of
# eight, and rows of a tile (measured; 1 % more or less from seed to seed).
_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_LISTED: dict[tuple[int, int, int], Sequence[float]] = {
    (2, 1, 16): (1.04, 1.02, 1.03, 1.0, 1.29, 2.0),
    (2, 1, 32): (1.02, 1.03, 1.0, 1.04, 1.42, 2.0),
    (2, 1, 64): (1.0, 1.04, 1.04, 1.21, 1.46, 2.0),
    (2, 1, 128): (1.0, 1.0, 1.04, 1.33, 1.54, 2.0),
    (2, 8, 16): (1.04, 1.08, 1.54, 1.92, 2.0, 2.0),
    (2, 8, 32): (1.04, 1.25, 1.83, 2.0, 2.0, 2.0),
    (2, 8, 64): (1.04, 1.38, 1.96, 2.0, 2.0, 2.0),
    (2, 8, 128): (1.13, 1.58, 2.0, 2.0, 2.0, 2.0),
    (4, 1, 16): (1.04, 1.02, 1.03, 1.05, 1.38, 2.0),
    (4, 1, 32): (1.02, 1.03, 1.04, 1.21, 1.54, 2.0),
    (4, 1, 64): (1.0, 1.04, 1.12, 1.38, 1.62, 2.0),
    (4, 1, 128): (1.04, 1.04, 1.33, 1.46, 1.71, 2.0),
    (4, 8, 16): (1.17, 1.42, 1.96, 2.0, 2.0, 2.0),
    (4, 8, 32): (1.29, 1.75, 2.0, 2.0, 2.0, 2.0),
    (4, 8, 64): (1.5, 1.92, 2.0, 2.0, 2.0, 2.0),
    (4, 8, 128): (1.75, 2.0, 2.0, 2.0, 2.0, 2.0),
}
# Taller tiles list as many as these.
_MOST_MEASURED = 128
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
    columns = float(fit.columns if shape.run == 1 else fit.run_columns)
    nonzeros = profile.nnz
    needed: dict[str, float] = {}
    if shape.parts == ("dense",):
        needed["dense"] = columns
    else:
        if "dense" in shape.parts:
            needed["dense"] = float(fit.full_columns)
            columns -= fit.full_columns
            nonzeros -= fit.full_nnz
        density = nonzeros / max(1.0, columns * shape.mt)
        needed["sparse"] = columns * _listed(profile, fit, shape, density)
    # The last chunk of each tile is filled up.
    return {
        part: count + fit.tiles * shape.kb / 2 * bool(count) for part, count in needed.items()
    }, fit


def _listed(profile: SparsityProfile, fit: TileFit, shape: TensorShape, density: float) -> float:
    """Estimate how often a column is listed for two of four, or float32's one of two."""
    halves = shape.element_bytes == 2
    if halves and any(
        nm.holds and (nm.n, nm.m) in ((1, 4), (2, 4)) and nm.along == "columns" for nm in profile.nm
    ):
        return 1.0
    if halves and shape.run == 1 and shape.parts == ("sparse",) and fit.two_of_four:
        return 1.0
    ratios = _LISTED[shape.element_bytes, shape.run, min(shape.mt, _MOST_MEASURED)]
    place = min(max(density, _DENSITIES[0]), _DENSITIES[-1])
    upper = next(i for i, known in enumerate(_DENSITIES) if known >= place)
    if upper == 0:
        return ratios[0]
    low, high = _DENSITIES[upper - 1], _DENSITIES[upper]
    share = (place - low) / (high - low)
    return ratios[upper - 1] + share * (ratios[upper] - ratios[upper - 1])


def tensor_registers(shape: TensorShape, width: int) -> int:
    """Estimate a thread's registers; `width` is how many elements come as one."""
    if shape.element_bytes == 4:
        # Split rows, and one split fragment of columns at a time.
        return _OTHER_REGISTERS - 16 + 4 * shape.mf * shape.nf + shape.mf * 8 + 8
    fragments = shape.mf * 4 + shape.nf * 2 * _units(shape.parts[-1])
    pieces = shape.kb * shape.nt // (width * shape.warps * WARP)
    entries = pieces * (2 if width == 1 else 1) if shape.run == 1 else 1
    return _OTHER_REGISTERS + 4 * shape.mf * shape.nf + fragments + entries


def _units(part: str) -> int:
    return STEP_BYTES[part] // UNIT_BYTES


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
        + _RESULT_INSTRUCTIONS * results,
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
    count = pieces * (4 if width * size >= 4 else _ELEMENT_INSTRUCTIONS)
    if width == 1:
        # Where each element lies is worked out, and whether it is there.
        count = pieces * _ELEMENT_INSTRUCTIONS
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
