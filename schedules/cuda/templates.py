"""The CUDA kernel templates, as one table: rows are tried by the planner and the tuner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...formats import Match, PackedWeight
from ...formats.splitting import MAX_BLOCK
from ...profile import SparsityProfile
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from ..base import Config, KernelTemplate
from . import cost
from .bitmap_templates import BITMAP_TEMPLATES
from .conv_io import ConvTile
from .matmul_io import MatmulTile
from .row_tiles import TileIO, TileShape, build_row_tiles
from .tensor_templates import TENSOR_TEMPLATES
from .threads import WARP

# Rows of a tile, warps, and columns that a lane sums up; the usual best first.
_TILES: tuple[tuple[int, int, int], ...] = (
    (64, 8, 4),
    (32, 4, 4),
    (64, 8, 2),
    (32, 8, 2),
    (128, 8, 4),
    (32, 8, 1),
)
# Columns of a block of the weight, about: whole channels of a convolution.
_BLOCKS = (64, 32, 128)
_STEPS = (4, 2, 1)
# What a configuration that was written by hand may hold.
_VECTORS = (1, 2, 4)
_MOST_WARPS = 32
_MOST_SUMS = 128


def _shape(workload: Workload, config: Config, most: int) -> TileShape:
    assert workload.geometry is not None
    rows, columns = workload.geometry.weight_shape
    sizes = {key: int(config[key]) for key in ("mt", "kb", "step", "warps", "nt")}
    return TileShape(rows=rows, columns=columns, most=max(most, sizes["step"]), **sizes)


def _io(workload: Workload, shape: TileShape) -> TileIO:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return MatmulTile(geometry, workload.epilogue, shape)
    assert geometry is not None
    return ConvTile(geometry, workload.epilogue, shape)


def _supports(workload: Workload, machine: CudaMachine) -> Match:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry) and geometry.layout == "panels":
        return Match(False, "activations in panels are for processors")
    if isinstance(geometry, Conv2dGeometry) and geometry.groups > 1:
        return Match(False, f"a convolution of {geometry.groups} groups has no sparse kernel")
    if isinstance(geometry, Conv2dGeometry) and _taps(workload) > MAX_BLOCK:
        return Match(False, f"a kernel of {geometry.kernel} taps")
    return Match(True)


def _taps(workload: Workload) -> int:
    """Count the weight's columns of one channel."""
    geometry = workload.geometry
    return math.prod(geometry.kernel) if isinstance(geometry, Conv2dGeometry) else 1


def _space(workload: Workload, machine: CudaMachine) -> list[Config]:
    geometry = workload.geometry
    assert geometry is not None
    columns = geometry.weight_shape[1]
    taps = _taps(workload)
    widest = -(-_columns_a_grid(workload) // WARP)
    found: list[Config] = []
    for mt, warps, nt in _TILES:
        fitting = min(nt, 1 << (widest - 1).bit_length())
        for size in _BLOCKS:
            kb = min(max(1, size // taps), -(-columns // taps)) * taps
            for step in _STEPS:
                config = {"mt": mt, "kb": kb, "step": step, "warps": warps, "nt": fitting}
                shape = _shape(workload, config, 0)
                fits = cost.shared_bytes(shape, _io(workload, shape)) <= machine.block_shared_bytes
                if config not in found and fits:
                    found.append(config)
    return found


def _columns_a_grid(workload: Workload) -> int:
    """Count the columns that a tile can be taken from: those of one image."""
    geometry = workload.geometry
    return geometry.pixels if isinstance(geometry, Conv2dGeometry) else cost.columns_of(workload)


def _check(workload: Workload, machine: CudaMachine, config: Config) -> str:
    taps = _taps(workload)
    if config["kb"] % taps:
        return f"needs whole channels of {taps} taps in 'kb', not {config['kb']} columns"
    if config["mt"] % config["warps"] or config["warps"] > _MOST_WARPS:
        return f"cannot share {config['mt']} rows out among {config['warps']} warps"
    if config["nt"] not in _VECTORS or config["step"] not in _VECTORS:
        return f"reads vectors of {', '.join(map(str, _VECTORS))}: 'nt' and 'step' are such numbers"
    if config["mt"] // config["warps"] * config["nt"] > _MOST_SUMS:
        return f"asks for more than {_MOST_SUMS} sums a thread"
    return ""


def _build(workload: Workload, machine: CudaMachine, packed: PackedWeight, config: Config) -> Any:
    shape = _shape(workload, config, packed.config["most"])
    io = _io(workload, shape)
    needed = cost.shared_bytes(shape, io)
    if needed > machine.block_shared_bytes:
        raise ValueError(
            f"a block would need {needed} bytes of shared memory; {machine.arch} has "
            f"{machine.block_shared_bytes}"
        )
    shape = replace(shape, at_once=max(1, cost.at_once(machine, shape, io)))
    return build_row_tiles("spmm" if workload.op == "matmul" else "spconv", shape, io)


def _events(
    workload: Workload, machine: CudaMachine, profile: SparsityProfile, config: Config
) -> cost.Events:
    mt, kb, step = (int(config[key]) for key in ("mt", "kb", "step"))
    shape = _shape(workload, config, cost.expected_most(profile, mt, kb, step))
    return cost.row_tiles_events(workload, machine, profile, shape, _io(workload, shape))


def _estimate(
    workload: Workload, machine: CudaMachine, profile: SparsityProfile, config: Config
) -> float:
    return cost.microseconds(_events(workload, machine, profile, config), machine)


TEMPLATES: Sequence[KernelTemplate] = (
    KernelTemplate(
        name="cuda_row_tiles",
        format="row_tiles",
        supports=_supports,
        space=_space,
        build=_build,
        events=_events,
        estimate=_estimate,
        check=_check,
    ),
    *TENSOR_TEMPLATES,
    *BITMAP_TEMPLATES,
)
