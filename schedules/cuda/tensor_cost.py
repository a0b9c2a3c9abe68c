"""What kernels for tensor cores cost a GPU: events from what tiles need, see `cost`.

Beside what every kernel does, they keep tensor cores busy and fetch the activations of every tile
of rows from L2, as often as there are tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...profile import SparsityProfile, TileFit
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from .cost import Events, columns_of, input_elements
from .pixel_rows import reads_pixels_in_order
from .tensor_tiles import STEPS, TensorShape
from .threads import WARP

# Registers beside sums and fragments, as nvcc 13 keeps them.
_OTHER_REGISTERS = 64
# Warp instructions of a warp's step beside its loads and multiplications.
_STEP_OVERHEAD = 8
# Of an element that comes by way of registers, and of a result.
_ELEMENT_INSTRUCTIONS, _RESULT_INSTRUCTIONS = 14, 8
# Columns that `formats.tensor_tiles` lists to make a random pattern two of four, over those that
# have a nonzero, by density in them and rows of a tile, single and in runs of eight (measured; 1 %
# more or less from seed to seed).
_DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_LISTED: dict[tuple[int, int], Sequence[float]] = {
    (1, 16): (1.04, 1.02, 1.03, 1.0, 1.29, 2.0),
    (1, 32): (1.02, 1.03, 1.0, 1.04, 1.42, 2.0),
    (1, 64): (1.0, 1.04, 1.04, 1.21, 1.46, 2.0),
    (1, 128): (1.0, 1.0, 1.04, 1.33, 1.54, 2.0),
    (8, 16): (1.04, 1.08, 1.54, 1.92, 2.0, 2.0),
    (8, 32): (1.04, 1.25, 1.83, 2.0, 2.0, 2.0),
    (8, 64): (1.04, 1.38, 1.96, 2.0, 2.0, 2.0),
    (8, 128): (1.13, 1.58, 2.0, 2.0, 2.0, 2.0),
}


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
    """Estimate how often a column is listed for two of four."""
    if any(
        nm.holds and (nm.n, nm.m) in ((1, 4), (2, 4)) and nm.along == "columns" for nm in profile.nm
    ):
        return 1.0
    if shape.run == 1 and shape.parts == ("sparse",) and fit.two_of_four:
        return 1.0
    ratios = _LISTED[shape.run, shape.mt]
    place = min(max(density, _DENSITIES[0]), _DENSITIES[-1])
    upper = next(i for i, known in enumerate(_DENSITIES) if known >= place)
    if upper == 0:
        return ratios[0]
    low, high = _DENSITIES[upper - 1], _DENSITIES[upper]
    share = (place - low) / (high - low)
    return ratios[upper - 1] + share * (ratios[upper] - ratios[upper - 1])


def tensor_registers(shape: TensorShape, width: int, others: int = _OTHER_REGISTERS) -> int:
    """Estimate a thread's registers; `width` is how many elements come as one.

    `others` are those beside sums and fragments.
    """
    halves = STEPS[shape.parts[-1]] // 16
    fragments = shape.mf * 4 + shape.nf * 2 * halves
    pieces = shape.kb * shape.nt // (width * shape.warps * WARP)
    entries = pieces * (2 if width == 1 else 1) if shape.run == 1 else 1
    return others + 4 * shape.mf * shape.nf + fragments + entries


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
