"""The table of x86 kernel templates, and the configurations that each may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ...formats import Match, PackedWeight
from ...formats.n_of_m import GROUPS
from ...formats.splitting import MAX_BLOCK
from ...panels import Panels, split_evenly
from ...profile import SparsityProfile
from ...targets import X86Machine
from ...workload import Conv2dGeometry, Epilogue, MatmulGeometry, Workload
from ..base import Config, KernelTemplate
from ..vectors import Vectors
from . import cost
from .channel_conv import ChannelConv
from .channel_kernel import ChannelShape, build_channel_kernel
from .channel_matmul import ChannelMatmul
from .compact_channels import CompactConv, CompactMatmul
from .conv_io import ConvIO
from .dense_kernel import PARALLEL_MICROSECONDS
from .depthwise import depthwise_conv2d
from .gemv import MAX_TOKENS, build_gemv
from .matmul_io import MatmulIO
from .metaschedule import METASCHEDULE
from .panel_kernel import PanelShape, Weight, build_panel_kernel
from .panel_weights import DenseWeight, GatheredWeight, MaskedWeight, SlicedWeight
from .panels_io import PanelsIO
from .pixel_tiles import pixel_tiles
from .streamed_weights import PERMUTES, DenseStream, NOfMStream

# Blocks of a matmul's columns are whole vectors of every width, whichever one the kernel takes.
BLOCK_STEP = 16

# What a sparse layer is taken to keep, and nanoseconds of one vector multiply-add: whether threads
# pay is decided before the weight is known.
_TYPICAL_DENSITY = 0.1
_FMA_NANOSECONDS = 0.25

# Register tiles (rows, vectors) by vector registers, the usual best first.
_SPARSE_TILES: dict[int, tuple[tuple[int, int], ...]] = {
    32: ((6, 4), (4, 4), (4, 2)),
    16: ((3, 4), (2, 4), (6, 2)),
}
_SLICED_TILES: dict[int, tuple[tuple[int, int], ...]] = {
    32: ((4, 4), (4, 2)),
    16: ((2, 4), (4, 2)),
}
# Rows that blocks of weights have.
_GATHERED_TILES: dict[int, tuple[tuple[int, int], ...]] = {
    32: ((8, 3), (4, 4), (16, 1), (8, 2), (4, 6)),
    16: ((4, 3), (4, 2), (8, 1), (2, 4)),
}
# One vector of tokens, and one token: vectors of one float, whose rows the compiler may gather.
_NARROW_TILES = ((6, 1), (4, 1))
# More accumulators than this only spill.
_ACCUMULATORS = 128
# Vectors for few tokens, where a wide one would mostly multiply nothing.
_NARROWER = (4, 8)
_SCALAR_TILES = ((16, 1), (8, 1))
_DENSE_TILES: dict[int, tuple[tuple[int, int], ...]] = {
    32: ((6, 4), (8, 3), (12, 2), (14, 2), (16, 1), (4, 4), (3, 4), (1, 4)),
    16: ((4, 3), (6, 2), (12, 1), (2, 4), (1, 4)),
}

# Register tiles of the channel kernel (pixels, vectors). Seven pixels are a row, or half of one, of
# the images that are small.
_CHANNEL_TILES: dict[int, tuple[tuple[int, int], ...]] = {
    32: ((7, 2), (14, 2), (7, 3), (5, 4), (8, 2)),
    16: ((4, 2), (6, 2), (4, 3), (2, 4)),
}
# Pixels of an image or tokens up to which it is considered: beyond, its sums leave L2.
_MOST_CHANNEL_COLUMNS = 4096
# The share of L1 that a block of its weights takes.
_WEIGHTS_OF_L1 = 0.5

# How much of L1 a block of activations takes: somewhat more than all of it, the usual best, since
# L2 serves the rest beside the arithmetic; in sparse kernels also all of it, far more where
# nonzeros are few and blocks dear, or less where every second column is a nonzero: their stream
# takes its part of L1.
_BLOCKS_OF_L1 = (1.5, 1, 6, 0.67)
# Blocks of one vector a column are read a line here and a line there: what falls out of L1 is
# dear, and the weight's streams take their share of it.
_THIN_BLOCKS_OF_L1 = (0.75, 0.5)


def block_length(columns: int, width: int, floats: int, step: int) -> int:
    """Cut `columns` in equal blocks, multiples of `step`, of at most `floats` / `width` each.

    A packed block of activations fills L1, since every panel of rows reuses all of it.
    """
    longest = min(max(step, floats // width // step * step), MAX_BLOCK // step * step)
    blocks = math.ceil(columns / longest)
    return math.ceil(columns / blocks / step) * step


def block_step(workload: Workload, lanes: int) -> int:
    """Tell what a block of columns is whole numbers of: vectors of features, or channels."""
    geometry = workload.geometry
    return math.prod(geometry.kernel) if isinstance(geometry, Conv2dGeometry) else lanes


def columns_of(workload: Workload) -> int:
    """Count the columns of activations of one image, or all tokens."""
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return geometry.n or cost.SYMBOLIC_TOKENS
    assert geometry is not None
    return geometry.pixels


def _with_threads(
    config: dict[str, Any], workload: Workload, machine: X86Machine, one_core: float
) -> Config:
    """Use all threads where that pays; cut the rows where panels of activations are few."""
    if workload.threads <= 1 or one_core < PARALLEL_MICROSECONDS:
        return {**config, "threads": 1, "parts": 1}
    geometry = workload.geometry
    symbolic = isinstance(geometry, MatmulGeometry) and geometry.n is None
    panels = split_evenly(columns_of(workload), config["nt"], machine.lanes).total
    enough = panels >= 4 * workload.threads or panels % workload.threads == 0
    parts = 1 if enough and not symbolic else workload.threads
    return {**config, "threads": workload.threads, "parts": parts}


def row_multiple(config: Config, lanes: int) -> int:
    """Row ranges end where a panel and a vector of rows end."""
    return math.lcm(int(config["mr"]), lanes)


def _tiles_that_fit(
    tiles: Sequence[tuple[int, int]], workload: Workload, lanes: int
) -> list[tuple[int, int]]:
    widest = math.ceil(columns_of(workload) / lanes)
    fitting = [tile for tile in tiles if tile[1] <= widest]
    narrow = [(mr, widest) for mr, nt in tiles if nt > widest and (mr, widest) not in fitting]
    return list(dict.fromkeys(fitting + narrow))


def _sparse_space(workload: Workload, machine: X86Machine) -> list[Config]:
    return _space_over(_SPARSE_TILES[machine.registers], workload, machine)


def _gathered_space(workload: Workload, machine: X86Machine) -> list[Config]:
    return _space_over(_GATHERED_TILES[machine.registers], workload, machine)


def _sliced_space(workload: Workload, machine: X86Machine) -> list[Config]:
    machine = narrowed(workload, machine)
    if machine.lanes == 1:
        tiles: Sequence[tuple[int, int]] = _SCALAR_TILES
    elif columns_of(workload) <= machine.lanes:
        tiles = _NARROW_TILES
    else:
        tiles = _SLICED_TILES[machine.registers]
    configs = _space_over(tiles, workload, machine)
    # Activations that come in panels have their zeros behind the last feature.
    panels = getattr(workload.geometry, "layout", "rows") == "panels"
    more = {"zeros_behind": "matrix"} if panels else {}
    return [
        {**config, "share": 2 if config["mr"] % 2 == 0 and machine.lanes > 1 else 1, **more}
        for config in configs
    ]


def narrowed(workload: Workload, machine: X86Machine) -> X86Machine:
    """Narrow the vectors for a few tokens: a wide one would multiply mostly what nobody reads."""
    geometry = workload.geometry
    if not isinstance(geometry, MatmulGeometry) or geometry.n is None:
        return machine
    fitting = [lanes for lanes in (1, *_NARROWER) if geometry.n <= lanes < machine.lanes]
    return replace(machine, lanes=fitting[0]) if fitting else machine


def _space_over(
    tiles: Sequence[tuple[int, int]], workload: Workload, machine: X86Machine
) -> list[Config]:
    """List the configurations of a sparse kernel: register tiles, and lengths of blocks."""
    assert workload.geometry is not None
    rows, columns = workload.geometry.weight_shape
    step = block_step(workload, BLOCK_STEP)
    multiplied = workload.geometry.macs(cost.SYMBOLIC_TOKENS) / machine.lanes * _TYPICAL_DENSITY
    one_core = multiplied * _FMA_NANOSECONDS * 1e-3
    configs: list[Config] = []
    for mr, nt in _tiles_that_fit(tiles, workload, machine.lanes):
        width = nt * machine.lanes
        lengths = [
            block_length(columns, width, int(share * machine.l1_bytes) // 4, step)
            for share in (_BLOCKS_OF_L1 if nt > 1 else _THIN_BLOCKS_OF_L1)
        ]
        for kb in dict.fromkeys(lengths):
            config = {"mr": min(mr, rows), "nt": nt, "kb": kb, "multiple": 0}
            config["multiple"] = row_multiple(config, machine.lanes)
            configs.append(_with_threads(config, workload, machine, one_core))
    return configs


def _dense_space(workload: Workload, machine: X86Machine) -> list[Config]:
    geometry = workload.geometry
    assert geometry is not None
    groups = getattr(geometry, "groups", 1)
    rows, columns = geometry.weight_shape
    configs: list[Config] = []
    for mr, nt in _tiles_that_fit(_DENSE_TILES[machine.registers], workload, machine.lanes):
        width = nt * machine.lanes
        step = block_step(workload, machine.lanes)
        kb = block_length(columns, width, int(_BLOCKS_OF_L1[0] * machine.l1_bytes) // 4, step)
        config = {"mr": min(mr, rows // groups), "nt": nt, "kb": kb, "groups": groups}
        events = cost.dense_events(workload, machine, config)
        one_core = cost.microseconds(events, workload, machine, {})
        configs.append(_with_threads(config, workload, machine, one_core))
    return configs


def _check_tile(workload: Workload, machine: X86Machine, config: Config) -> str:
    return _check_block(workload, machine, config) or _check_sums(config["mr"], config["nt"])


def _check_channels(workload: Workload, machine: X86Machine, config: Config) -> str:
    if config["mr"] % machine.lanes:
        return f"needs a multiple of {machine.lanes} (the vector width) as 'mr', not {config['mr']}"
    return _check_block(workload, machine, config) or _check_sums(
        config["pixels"], config["mr"] // machine.lanes
    )


def _check_block(workload: Workload, machine: X86Machine, config: Config) -> str:
    assert workload.geometry is not None
    step = block_step(workload, machine.lanes)
    columns, kb = workload.geometry.weight_shape[1], config["kb"]
    if kb % step == 0 or kb >= columns:
        return ""
    what = "the vector width" if workload.op == "matmul" else "the taps of a channel"
    return (
        f"needs a multiple of {step} ({what}) as 'kb', or at least all {columns} columns, not {kb}"
    )


def _check_sums(rows: int, vectors: int) -> str:
    if rows * vectors <= _ACCUMULATORS:
        return ""
    return f"asks for a tile of {rows} x {vectors} vectors; at most {_ACCUMULATORS} are sensible"


def _shape(
    workload: Workload, machine: X86Machine, config: Config, bounds: Sequence[int]
) -> PanelShape:
    geometry = workload.geometry
    assert geometry is not None
    groups = getattr(geometry, "groups", 1)
    rows, columns = geometry.weight_shape
    mr = int(config["mr"])
    return PanelShape(
        rows=rows // groups,
        columns=columns,
        mr=mr,
        nt=int(config["nt"]),
        kb=int(config["kb"]),
        splits=tuple((bound, math.ceil(bound / mr)) for bound in bounds),
        lanes=machine.lanes,
        threads=int(config["threads"]),
    )


def _panel_kernel(
    name: str, workload: Workload, machine: X86Machine, shape: PanelShape, weight: Weight
) -> Any:
    geometry = workload.geometry
    io: MatmulIO | PanelsIO | ConvIO
    if isinstance(geometry, MatmulGeometry) and geometry.layout == "panels":
        assert geometry.n is not None
        panels = Panels(geometry.n, shape.nt, machine.lanes)
        io = PanelsIO(geometry, workload.epilogue, panels, shape.mr, shape.kb)
    elif isinstance(geometry, MatmulGeometry):
        io = MatmulIO(geometry, workload.epilogue, machine.lanes, shape.mr, shape.kb)
    else:
        assert geometry is not None
        io = ConvIO(geometry, workload.epilogue, machine.lanes, shape.mr, shape.kb)
    narrower = {}
    if isinstance(io, MatmulIO) and io.geometry.n is None:
        fitting = [lanes for lanes in _NARROWER if lanes < machine.lanes]
        narrower = {lanes: partial(io.with_lanes, lanes) for lanes in fitting}
    return build_panel_kernel(name, shape, io, weight, narrower)


def _build_sparse(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    return _build_packed(MaskedWeight, workload, machine, packed, config)


def _build_gathered(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    return _build_packed(GatheredWeight, workload, machine, packed, config)


def _build_sliced(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    kind = partial(SlicedWeight, share=packed.config["share"])
    return _build_packed(kind, workload, narrowed(workload, machine), packed, config)


def _build_packed(
    kind: Callable[[int, int, int], Weight],
    workload: Workload,
    machine: X86Machine,
    packed: PackedWeight,
    config: Config,
) -> Any:
    shape = _shape(workload, machine, config, packed.config["bounds"])
    weight = kind(shape.mr, math.ceil(shape.rows / shape.mr), shape.blocks)
    name = "spmm" if workload.op == "matmul" else "spconv"
    return _panel_kernel(name, workload, machine, shape, weight)


def _build_dense(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    groups = int(config.get("groups", 1))
    rows = packed.shape[0] // groups
    parts, multiple = int(config["parts"]), row_multiple(config, machine.lanes)
    step = max(multiple, math.ceil(rows / parts / multiple) * multiple)
    shape = _shape(workload, machine, config, [*range(0, rows, step), rows])
    weight = DenseWeight(shape.mr, math.ceil(rows / shape.mr), shape.columns, shape.kb, groups)
    name = "gemm" if workload.op == "matmul" else "conv"
    return _panel_kernel(name, workload, machine, shape, weight)


def _supports_sparse(workload: Workload, machine: X86Machine) -> Match:
    geometry = workload.geometry
    if isinstance(geometry, Conv2dGeometry) and geometry.is_depthwise:
        return Match(
            False, "a depthwise convolution has one input channel a group: too few zeros to skip"
        )
    if isinstance(geometry, Conv2dGeometry) and geometry.groups > 1:
        return Match(False, f"a convolution of {geometry.groups} groups has no sparse kernel")
    return _supports_dense(workload, machine)


def _supports_dense(workload: Workload, machine: X86Machine) -> Match:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry) and geometry.layout == "panels" and geometry.n is None:
        return Match(False, "activations in panels need a known number of tokens")
    return Match(True)


def _supports_gemv(workload: Workload, machine: X86Machine) -> Match:
    geometry = workload.geometry
    if not isinstance(geometry, MatmulGeometry):
        return Match(False, "only for matrix products")
    most = MAX_TOKENS[machine.registers]
    if geometry.n is None or geometry.n > most:
        return Match(False, f"only for 1 to {most} tokens")
    if geometry.layout == "panels":
        return Match(False, "takes activations in rows, not in panels")
    return Match(True)


def _supports_n_of_m(workload: Workload, machine: X86Machine) -> Match:
    if machine.lanes not in PERMUTES:
        return Match(False, f"vectors of {machine.lanes} floats are not permuted by an index")
    return _supports_gemv(workload, machine)


def _check_n_of_m(workload: Workload, machine: X86Machine, config: Config) -> str:
    if config["m"] in GROUPS:
        return ""
    return f"needs groups of {' or '.join(map(str, GROUPS))} columns as 'm', not {config['m']}"


def _supports_channels(workload: Workload, machine: X86Machine) -> Match:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry) and geometry.layout == "panels":
        return Match(False, "takes activations in rows, not in panels")
    if isinstance(geometry, MatmulGeometry) and geometry.n is None:
        return Match(False, "needs a known number of tokens")
    if columns_of(workload) > _MOST_CHANNEL_COLUMNS:
        return Match(False, f"only for up to {_MOST_CHANNEL_COLUMNS} pixels of an image, or tokens")
    return Match(True)


def _supports_compact(workload: Workload, machine: X86Machine) -> Match:
    return _supports_sparse(workload, machine) and _supports_channels(workload, machine)


def _supports_depthwise(workload: Workload, machine: X86Machine) -> Match:
    geometry = workload.geometry
    if not isinstance(geometry, Conv2dGeometry) or not geometry.is_depthwise:
        return Match(False, "only for depthwise convolutions")
    if geometry.strides[1] > 2:
        return Match(False, f"a depthwise convolution with stride {geometry.strides[1]}")
    return Match(True)


def _sliced_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> cost.Events:
    return cost.sliced_events(workload, narrowed(workload, machine), profile, config)


def _dense_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> cost.Events:
    return cost.dense_events(workload, machine, config)


def _gemv_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> cost.Events:
    return cost.gemv_events(workload, machine)


def _channel_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> cost.Events:
    return cost.channel_events(workload, machine, config)


def _depthwise_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> cost.Events:
    return cost.depthwise_events(workload, machine)


def _gemv_space(workload: Workload, machine: X86Machine) -> list[Config]:
    assert workload.geometry is not None
    bytes_read = 4 * math.prod(workload.geometry.weight_shape)
    threads = workload.threads if bytes_read > 1 << 20 else 1
    return [{"mr": machine.lanes, "groups": 1, "threads": threads}]


def _n_of_m_space(workload: Workload, machine: X86Machine) -> list[Config]:
    [usual] = _gemv_space(workload, machine)
    return [{"mr": usual["mr"], "m": m, "threads": usual["threads"]} for m in GROUPS]


def _depthwise_space(workload: Workload, machine: X86Machine) -> list[Config]:
    return [{"threads": workload.threads}]


def _channel_space(workload: Workload, machine: X86Machine) -> list[Config]:
    geometry = workload.geometry
    assert geometry is not None
    groups = getattr(geometry, "groups", 1)
    rows, columns = geometry.weight_shape
    widest = math.ceil(rows // groups / machine.lanes)
    configs: dict[tuple[int, int], Config] = {}
    for most, nv in _channel_tiles(workload, machine):
        vectors = min(nv, widest)
        mr = vectors * machine.lanes
        step = block_step(workload, machine.lanes)
        kb = block_length(columns, mr, int(_WEIGHTS_OF_L1 * machine.l1_bytes) // 4, step)
        config = {"mr": mr, "pixels": most, "kb": kb, "groups": groups, "threads": 1}
        events = cost.channel_events(workload, machine, config)
        if cost.microseconds(events, workload, machine, config) >= PARALLEL_MICROSECONDS:
            config["threads"] = min(workload.threads, math.ceil(rows // groups / mr))
        largest = max(pixels for pixels, _ in pixel_tiles(geometry, most).sizes())
        configs.setdefault((largest, vectors), config)
    return list(configs.values())


def _compact_space(workload: Workload, machine: X86Machine) -> list[Config]:
    taps = _taps(workload)
    configs = _channel_space(workload, machine)
    return [{**{k: c[k] for k in c if k != "groups"}, "taps": taps} for c in configs]


def _channel_tiles(workload: Workload, machine: X86Machine) -> list[tuple[int, int]]:
    """List the register tiles that leave room for what else is held; all if none does."""
    geometry, tiles = workload.geometry, _CHANNEL_TILES[machine.registers]
    assert geometry is not None
    taps = geometry.kernel[1] if isinstance(geometry, Conv2dGeometry) else 1

    def fits(most: int, vectors: int) -> bool:
        across = pixel_tiles(geometry, most).across.nt
        pixels = max(pixels for pixels, _ in pixel_tiles(geometry, most).sizes())
        needed = (pixels + 1) * vectors
        # Neighbouring taps share activations, which the compiler keeps from one to the next.
        spread = pixels // across * (across + taps - 1) - 1 if taps > 1 else 1
        return needed + spread <= machine.registers

    return [tile for tile in tiles if fits(*tile)] or list(tiles)


def _build_dense_gemv(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    rows, columns = packed.shape
    panels = math.ceil(rows / machine.lanes)
    weight = DenseStream(Vectors(machine.lanes), panels, columns)
    return build_gemv(workload, machine, weight, config)


def _build_n_of_m(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    rows, columns = packed.shape
    panels = math.ceil(rows / machine.lanes)
    n, m = int(packed.config["n"]), int(packed.config["m"])
    weight = NOfMStream(Vectors(machine.lanes), panels, columns, n, m)
    return build_gemv(workload, machine, weight, config)


def _build_channels(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    groups, taps = int(packed.config["groups"]), _taps(workload)
    left = packed.shape[0] // groups, packed.shape[1] // taps
    return _build_channel_kernel(ChannelMatmul, ChannelConv, workload, machine, config, left)


def _build_compact(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    left = int(packed.config["rows"]), int(packed.config["channels"])
    matmul, conv = partial(CompactMatmul, left[1]), partial(CompactConv, left[1])
    return _build_channel_kernel(matmul, conv, workload, machine, config, left)


def _taps(workload: Workload) -> int:
    return math.prod(getattr(workload.geometry, "kernel", (1, 1)))


def _build_channel_kernel(
    matmul: Callable[[MatmulGeometry, Epilogue, int, int, int], ChannelMatmul],
    conv: Callable[[Conv2dGeometry, Epilogue, int, int, int], ChannelConv],
    workload: Workload,
    machine: X86Machine,
    config: Config,
    left: tuple[int, int],
) -> Any:
    """Build the kernel for a weight that has so many rows and input channels in every group."""
    geometry, epilogue = workload.geometry, workload.epilogue
    assert geometry is not None
    mr, kb = int(config["mr"]), int(config["kb"])
    io: ChannelMatmul | ChannelConv
    if isinstance(geometry, MatmulGeometry):
        io = matmul(geometry, epilogue, machine.lanes, mr, kb)
    else:
        io = conv(geometry, epilogue, machine.lanes, mr, kb)
    shape = ChannelShape(
        rows=left[0],
        depth=left[1],
        kernel=getattr(geometry, "kernel", (1, 1)),
        groups=int(config.get("groups", 1)),
        vectors=mr // machine.lanes,
        block=math.ceil(kb / _taps(workload)),
        lanes=machine.lanes,
        threads=int(config["threads"]),
    )
    name = "gemm" if workload.op == "matmul" else "conv"
    return build_channel_kernel(name, shape, io, pixel_tiles(geometry, int(config["pixels"])))


def _compact_arguments(workload: Workload, packed: PackedWeight) -> list[np.ndarray]:
    """Features are spread by counting, images by listing."""
    lists = ("channels", "before" if workload.op == "matmul" else "rows")
    return [packed.arrays[name] for name in (*lists, "values")]


def _build_depthwise(
    workload: Workload, machine: X86Machine, packed: PackedWeight, config: Config
) -> Any:
    assert isinstance(workload.geometry, Conv2dGeometry)
    return depthwise_conv2d(workload.geometry, machine, workload.epilogue)


def _depthwise_arguments(workload: Workload, packed: PackedWeight) -> list[np.ndarray]:
    assert isinstance(workload.geometry, Conv2dGeometry)
    return [packed.arrays["values"].reshape(-1, 1, *workload.geometry.kernel)]


def _priced(
    events: Callable[[Workload, X86Machine, SparsityProfile, Config], cost.Events],
) -> Any:
    """Return both fields of a template that follow from what it counts: events and estimate."""

    def estimate(
        workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
    ) -> float:
        counted = events(workload, machine, profile, config)
        return cost.microseconds(counted, workload, machine, config)

    return {"events": events, "estimate": estimate}


TEMPLATES: tuple[KernelTemplate, ...] = (
    KernelTemplate(
        name="register_tile",
        format="register_tiled",
        supports=_supports_sparse,
        space=_sparse_space,
        build=_build_sparse,
        check=_check_tile,
        **_priced(cost.sparse_events),
    ),
    KernelTemplate(
        name="sliced_rows",
        format="sliced_ell",
        supports=_supports_sparse,
        space=_sliced_space,
        build=_build_sliced,
        check=_check_tile,
        **_priced(_sliced_events),
    ),
    KernelTemplate(
        name="gathered_panels",
        format="gathered_panels",
        supports=_supports_sparse,
        space=_gathered_space,
        build=_build_gathered,
        check=_check_tile,
        **_priced(cost.gathered_events),
    ),
    KernelTemplate(
        name="dense_panels",
        format="dense",
        supports=_supports_dense,
        space=_dense_space,
        build=_build_dense,
        check=_check_tile,
        **_priced(_dense_events),
    ),
    KernelTemplate(
        name="gemv",
        format="dense",
        supports=_supports_gemv,
        space=_gemv_space,
        build=_build_dense_gemv,
        **_priced(_gemv_events),
    ),
    KernelTemplate(
        name="n_of_m",
        format="n_of_m",
        supports=_supports_n_of_m,
        space=_n_of_m_space,
        build=_build_n_of_m,
        check=_check_n_of_m,
        **_priced(cost.n_of_m_events),
    ),
    KernelTemplate(
        name="channel_vectors",
        format="dense",
        supports=_supports_channels,
        space=_channel_space,
        build=_build_channels,
        check=_check_channels,
        **_priced(_channel_events),
    ),
    KernelTemplate(
        name="compact_channels",
        format="compact_channels",
        supports=_supports_compact,
        space=_compact_space,
        build=_build_compact,
        arguments=_compact_arguments,
        check=_check_channels,
        **_priced(cost.compact_events),
    ),
    KernelTemplate(
        name="depthwise",
        format="plain",
        supports=_supports_depthwise,
        space=_depthwise_space,
        build=_build_depthwise,
        arguments=_depthwise_arguments,
        **_priced(_depthwise_events),
    ),
    METASCHEDULE,
)
