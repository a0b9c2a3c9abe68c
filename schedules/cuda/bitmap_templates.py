"""The template of the kernel of bitmaps: few tokens, any pattern, half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...dtypes import HALF_TYPES
from ...formats import Match, PackedWeight
from ...formats.bitmap_tiles import MOST_ELEMENTS, STEP
from ...profile import TILE_HEIGHTS, SparsityProfile
from ...targets import CudaMachine
from ...workload import MatmulGeometry, Workload
from ..base import Config, KernelTemplate
from . import cost
from .bitmap_cost import bitmap_at_once, bitmap_events, expected_most
from .bitmap_tiles import BitmapShape, BitmapWeight
from .tensor_tiles import FRAGMENT_COLUMNS, FRAGMENT_ROWS, build_tensor_tiles
from .token_rows import RUN, TokenRows

# Tokens from which on kernels that gather columns, or dense ones, are ahead.
MOST_TOKENS = 128
# Rows of a block's tile, warps that share rows and steps, chunks in shared memory at a time and the
# columns of one. The usual best come first.
_TILES: tuple[tuple[int, int, int, int, int], ...] = (
    (64, 2, 4, 3, 256),
    (64, 2, 4, 4, 128),
    (64, 2, 2, 3, 128),
    (64, 1, 4, 3, 128),
    (128, 4, 2, 3, 128),
    (32, 1, 4, 3, 256),
    (32, 1, 8, 3, 256),
    (32, 1, 4, 4, 128),
    (16, 1, 4, 4, 256),
    (16, 1, 8, 3, 256),
    (16, 1, 4, 4, 64),
)
_KEYS = ("mt", "warps_m", "warps_k", "stages", "kb")
_WIDTHS = (8, 16, 32, 64)
_MOST_WARPS, _MOST_STAGES, _MOST_FRAGMENTS, _MOST_COLUMNS = 16, 8, 32, 512


def _shape(workload: Workload, config: Config, most: int) -> BitmapShape:
    geometry = workload.geometry
    assert isinstance(geometry, MatmulGeometry)
    return BitmapShape(
        rows=geometry.m,
        columns=geometry.k,
        mt=int(config["mt"]),
        kb=int(config["kb"]),
        run=RUN,
        parts=("dense",),
        nt=int(config["nt"]),
        warps_m=int(config["warps_m"]),
        # A fragment that two warps want would be decoded twice.
        warps_n=1,
        warps_k=int(config["warps_k"]),
        stages=int(config["stages"]),
        dtype=workload.dtype,
        rows_inner=True,
        most=most,
    )


def _supports(workload: Workload, machine: CudaMachine) -> Match:
    geometry = workload.geometry
    if not isinstance(geometry, MatmulGeometry) or geometry.layout != "rows":
        return Match(False, "the kernel of bitmaps is for matrix products of tokens in rows")
    if geometry.k % RUN:
        return Match(False, f"{geometry.k} features of a token are no whole pieces of {RUN}")
    if cost.columns_of(workload) > MOST_TOKENS:
        return Match(False, f"{geometry.n} tokens; up to {MOST_TOKENS} the weight's bytes bind")
    return Match(True)


def _space(workload: Workload, machine: CudaMachine) -> list[Config]:
    wide = cost.columns_of(workload)
    geometry = workload.geometry
    is_known = isinstance(geometry, MatmulGeometry) and geometry.n is not None
    found: list[Config] = []
    for tile in _TILES:
        for nt in _WIDTHS:
            config = {**dict(zip(_KEYS, tile, strict=True)), "nt": nt}
            too_wide = nt >= 2 * wide and nt > FRAGMENT_COLUMNS
            too_narrow = is_known and nt < min(wide, _WIDTHS[-1]) / 2
            if not too_wide and not too_narrow and not _check(workload, machine, config):
                found.append(config)
    return found


def _check(workload: Workload, machine: CudaMachine, config: Config) -> str:
    mt, m, k, stages, kb = (int(config[key]) for key in _KEYS)
    nt = int(config["nt"])
    if mt not in TILE_HEIGHTS:
        return f"needs one of {', '.join(map(str, TILE_HEIGHTS))} rows in 'mt', not {mt}"
    if nt not in _WIDTHS:
        return f"needs one of {', '.join(map(str, _WIDTHS))} tokens in 'nt', not {nt}"
    if mt % (FRAGMENT_ROWS * m):
        return f"cannot share {mt} rows out among {m} warps"
    if kb % (STEP * k) or kb & (kb - 1) or kb > _MOST_COLUMNS:
        return f"cannot share chunks of {kb} columns out among {k} warps"
    if not 2 <= stages <= _MOST_STAGES or m * k > _MOST_WARPS:
        return f"takes 2 to {_MOST_STAGES} stages and at most {_MOST_WARPS} warps"
    if mt // (FRAGMENT_ROWS * m) * (nt // FRAGMENT_COLUMNS) > _MOST_FRAGMENTS:
        return f"asks for more than {_MOST_FRAGMENTS} fragments of sums a warp"
    if mt * kb > MOST_ELEMENTS or not bitmap_at_once(machine, _shape(workload, config, 0)):
        return f"makes blocks that a multiprocessor of {machine.arch} cannot hold"
    return ""


def _build(workload: Workload, machine: CudaMachine, packed: PackedWeight, config: Config) -> Any:
    shape = _shape(workload, config, packed.config["most"])
    at_once = bitmap_at_once(machine, shape)
    if not at_once:
        raise ValueError(
            f"a block would need {shape.memory_bytes} bytes of shared memory; {machine.arch} has "
            f"{machine.block_shared_bytes}"
        )
    shape = replace(shape, at_once=at_once)
    geometry = workload.geometry
    assert isinstance(geometry, MatmulGeometry)
    io = TokenRows(geometry, workload.epilogue, shape)
    return build_tensor_tiles("bitmap_spmm", shape, io, BitmapWeight(shape))


def _events(
    workload: Workload, machine: CudaMachine, profile: SparsityProfile, config: Config
) -> cost.Events:
    most = expected_most(profile, int(config["mt"]), int(config["kb"]))
    return bitmap_events(workload, machine, profile, _shape(workload, config, most))


def _estimate(
    workload: Workload, machine: CudaMachine, profile: SparsityProfile, config: Config
) -> float:
    return cost.microseconds(_events(workload, machine, profile, config), machine)


BITMAP_TEMPLATES: Sequence[KernelTemplate] = (
    KernelTemplate(
        name="cuda_bitmap_tiles",
        format="bitmap_tiles",
        supports=_supports,
        space=_space,
        build=_build,
        events=_events,
        estimate=_estimate,
        check=_check,
        dtypes=HALF_TYPES,
    ),
)
