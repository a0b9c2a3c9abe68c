"""Templates of kernels for tensor cores: what they take, their configurations, their building."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...dtypes import FLOAT_TYPES, numpy_dtype
from ...formats import FORMATS, Match, PackedWeight
from ...formats.tensor_tiles import TensorTiles, step_columns
from ...profile import TILE_HEIGHTS, SparsityProfile
from ...targets import CudaMachine
from ...workload import Conv2dGeometry, MatmulGeometry, Workload
from ..base import Config, KernelTemplate
from . import cost
from .feature_rows import FeatureRows, TurnedTokens
from .pixel_rows import PixelRows, tap_entries
from .tensor_cost import elements_at_once, tensor_at_once, tensor_events
from .tensor_tiles import (
    FRAGMENT_COLUMNS,
    FRAGMENT_ROWS,
    TensorIO,
    TensorShape,
    build_tensor_tiles,
)
from .token_rows import RUN, TokenRows

# Rows and columns of a block's tile; warps that share rows, columns and steps; chunks that are in
# shared memory at a time, and the bytes of a row of one. The usual best come first.
_TILES: tuple[tuple[int, int, int, int, int, int, int], ...] = (
    (128, 128, 2, 2, 1, 4, 64),
    (256, 128, 4, 2, 1, 4, 64),
    (128, 256, 2, 4, 1, 4, 64),
    (128, 128, 2, 2, 1, 3, 128),
    (128, 64, 2, 2, 1, 4, 64),
    (64, 128, 1, 4, 1, 4, 64),
    (64, 128, 1, 4, 1, 3, 128),
    (64, 64, 2, 2, 1, 4, 128),
    (32, 128, 1, 4, 1, 4, 128),
    (32, 64, 1, 2, 2, 4, 128),
    (16, 128, 1, 4, 1, 4, 128),
    (16, 64, 1, 2, 2, 4, 128),
    (64, 32, 2, 1, 2, 4, 128),
    (32, 32, 1, 1, 4, 4, 256),
    (64, 16, 2, 1, 2, 4, 128),
    (32, 16, 1, 1, 4, 4, 256),
    (64, 8, 2, 1, 2, 4, 128),
    (32, 8, 1, 1, 4, 4, 256),
    (16, 8, 1, 1, 4, 4, 256),
)
_KEYS = ("mt", "nt", "warps_m", "warps_n", "warps_k", "stages", "kb")
# A tile may be this much wider than the activations: a narrower one would compute the same.
_MOST_WIDTHS = 2
_MOST_WARPS, _MOST_STAGES, _MOST_FRAGMENTS = 16, 8, 32
_RUNS = (RUN, 1)
_MOST_ELEMENTS = 2**31 - 1


def _parts(name: str) -> tuple[str, ...]:
    weight_format = FORMATS[name]
    assert isinstance(weight_format, TensorTiles)
    return weight_format.parts


def _shape(workload: Workload, config: Config, parts: tuple[str, ...]) -> TensorShape:
    geometry = workload.geometry
    assert geometry is not None
    sizes: dict[str, Any] = {key: int(config[key]) for key in (*_KEYS, "run")}
    inner = isinstance(geometry, MatmulGeometry) and geometry.layout == "rows"
    return TensorShape(
        rows=geometry.weight_shape[0],
        parts=parts,
        dtype=workload.dtype,
        rows_inner=inner,
        **sizes,
    )


def _io(workload: Workload, shape: TensorShape) -> TensorIO:
    geometry = workload.geometry
    if isinstance(geometry, Conv2dGeometry):
        return PixelRows(geometry, workload.epilogue, shape)
    assert geometry is not None
    if geometry.layout == "features":
        return FeatureRows(geometry, workload.epilogue, shape)
    kind = TokenRows if shape.run == RUN else TurnedTokens
    return kind(geometry, workload.epilogue, shape)


def _supports(workload: Workload, machine: CudaMachine) -> Match:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry) and geometry.layout == "panels":
        return Match(False, "activations in panels are for processors")
    if isinstance(geometry, Conv2dGeometry) and geometry.groups > 1:
        return Match(False, f"a convolution of {geometry.groups} groups has no sparse kernel")
    elements = max(cost.input_elements(workload), cost.output_elements(workload))
    if elements > _MOST_ELEMENTS:
        return Match(False, f"activations of {elements} elements; kernels count in 32 bits")
    return Match(True)


def _fetches_runs(workload: Workload) -> bool:
    """Whether a token's neighbouring features can be fetched as one."""
    geometry = workload.geometry
    is_rows = isinstance(geometry, MatmulGeometry) and geometry.layout == "rows"
    return is_rows and geometry is not None and geometry.weight_shape[1] % RUN == 0


def _space(workload: Workload, machine: CudaMachine, parts: tuple[str, ...]) -> list[Config]:
    geometry = workload.geometry
    assert geometry is not None
    wide = cost.columns_of(workload)
    found: list[Config] = []
    for tile in _TILES:
        sizes = dict(zip(_KEYS, tile, strict=True))
        sizes["kb"] //= numpy_dtype(workload.dtype).itemsize
        too_wide = sizes["nt"] >= _MOST_WIDTHS * wide and sizes["nt"] > FRAGMENT_COLUMNS
        for run in _RUNS:
            config = {**sizes, "run": run}
            if not too_wide and not _check(workload, machine, config, parts):
                found.append(config)
    return found


def _check(workload: Workload, machine: CudaMachine, config: Config, parts: tuple[str, ...]) -> str:
    mt, nt, m, n, k, stages, kb = (int(config[key]) for key in _KEYS)
    step = max(step_columns(part, workload.dtype) for part in parts)
    if mt not in TILE_HEIGHTS:
        return f"needs one of {', '.join(map(str, TILE_HEIGHTS))} rows in 'mt', not {mt}"
    if mt % (FRAGMENT_ROWS * m) or nt % (FRAGMENT_COLUMNS * n) or nt & (nt - 1):
        return f"cannot share a tile of {mt} x {nt} out among {m} x {n} warps"
    if kb % (step * k) or kb & (kb - 1):
        return f"cannot share chunks of {kb} columns out among {k} warps in steps of {step}"
    if not 2 <= stages <= _MOST_STAGES or m * n * k > _MOST_WARPS:
        return f"takes 2 to {_MOST_STAGES} stages and at most {_MOST_WARPS} warps"
    if mt // (FRAGMENT_ROWS * m) * (nt // (FRAGMENT_COLUMNS * n)) > _MOST_FRAGMENTS:
        return f"asks for more than {_MOST_FRAGMENTS} fragments of sums a warp"
    if config["run"] not in _RUNS:
        return f"fetches runs of {_RUNS[0]} columns or single ones, not {config['run']}"
    if config["run"] == RUN and not _fetches_runs(workload):
        return f"can fetch single columns only here, not runs of {RUN}"
    shape = _shape(workload, config, parts)
    if not tensor_at_once(machine, shape, elements_at_once(workload, shape)):
        return f"makes blocks that a multiprocessor of {machine.arch} cannot hold"
    return ""


def _build(workload: Workload, machine: CudaMachine, packed: PackedWeight, config: Config) -> Any:
    shape = _shape(workload, config, _parts(packed.format))
    at_once = tensor_at_once(machine, shape, elements_at_once(workload, shape))
    shape = replace(shape, at_once=max(1, at_once), in_order=bool(packed.config["in_order"]))
    name = "spmm" if workload.op == "matmul" else "spconv"
    return build_tensor_tiles(f"tensor_{name}", shape, _io(workload, shape))


def _arguments(workload: Workload, packed: PackedWeight) -> Sequence[np.ndarray]:
    geometry = workload.geometry
    arrays = dict(packed.arrays)
    if isinstance(geometry, Conv2dGeometry):
        for part in _parts(packed.format):
            arrays[f"{part}_columns"] = tap_entries(geometry, arrays[f"{part}_columns"])
    return list(arrays.values())


def _template(weight_format: str) -> KernelTemplate:
    parts = _parts(weight_format)

    def events(
        workload: Workload, machine: CudaMachine, profile: SparsityProfile, config: Config
    ) -> cost.Events:
        shape = _shape(workload, config, parts)
        width = elements_at_once(workload, shape)
        return tensor_events(workload, machine, profile, shape, width)

    def estimate(
        workload: Workload, machine: CudaMachine, profile: SparsityProfile, config: Config
    ) -> float:
        return cost.microseconds(events(workload, machine, profile, config), machine)

    return KernelTemplate(
        name=f"cuda_{weight_format}",
        format=weight_format,
        supports=_supports,
        space=lambda workload, machine: _space(workload, machine, parts),
        build=_build,
        events=events,
        estimate=estimate,
        arguments=_arguments,
        check=lambda workload, machine, config: _check(workload, machine, config, parts),
        dtypes=frozenset(FLOAT_TYPES),
        on_tensor_cores=True,
    )


TENSOR_TEMPLATES: tuple[KernelTemplate, ...] = tuple(
    _template(name) for name in ("tile_wise", "two_four", "tile_wise_two_four")
)
