"""Dense layers as TVM's MetaSchedule tunes them: the plain computation, and a trace put on it.

A trace is the list of scheduling steps with their decisions. As JSON it is the whole configuration
of the kernel, so that a plan or a record builds it without MetaSchedule's database.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import te, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Trace

from ...formats import Match, PackedWeight
from ...profile import SparsityProfile
from ...targets import X86Machine
from ...workload import Conv2dGeometry, Epilogue, EpilogueOp, EpilogueRef, MatmulGeometry, Workload
from ..base import Config, KernelTemplate
from ..epilogue import EMITTERS
from . import vector_math

# From this many output channels of a group on they fill vectors; below, vectors run along the row.
_CHANNELS_OF_A_VECTOR = 8

_OPAQUE = 8

# Operations that are written again at each use rather than kept in memory.
_LARGEST_COPIED = 8

# A value at the indices of the result.
_At = Callable[..., Any]


def unscheduled(workload: Workload) -> tirx.PrimFunc:
    """Write a dense layer as blocks without a schedule: padding, products, epilogue.

    Parameters
    ----------
    workload : Workload
        A matrix product or a convolution of known shape.

    Returns
    -------
    PrimFunc
        Parameters (x, w, one vector per epilogue channel, one tensor of the result's shape per
        epilogue tensor, y), float32. A matrix product has x [n, k], w [k, m] and y [n, m]. A
        convolution has x and y in NCHW, and w as `weight_argument` lays it out.

    Raises
    ------
    ValueError
        When the shape is symbolic, or activations lie in panels.
    """
    match = _supports(workload)
    if not match:
        raise ValueError(match.reason)
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        x, w, product, shape = _matmul(geometry)
    else:
        assert isinstance(geometry, Conv2dGeometry)
        x, w, product, shape = _conv2d(geometry)
    features = shape[1]
    epilogue = workload.epilogue
    channels = [te.placeholder((features,), name=f"channel{i}") for i in range(epilogue.channels)]
    tensors = [te.placeholder(shape, name=f"tensor{i}") for i in range(epilogue.tensors)]
    y = _with_epilogue(epilogue, shape, product, channels, tensors)
    return te.create_prim_func([x, w, *channels, *tensors, y])


def _matmul(geometry: MatmulGeometry) -> tuple[Any, Any, _At, tuple[int, ...]]:
    n, m, k = geometry.n, geometry.m, geometry.k
    x = te.placeholder((n, k), name="x")
    w = te.placeholder((k, m), name="w")
    inner = te.reduce_axis((0, k), name="k")
    acc = te.compute(
        (n, m), lambda i, f: te.sum(x[i, inner] * w[inner, f], axis=inner), name="product"
    )
    assert n is not None
    return x, w, lambda i, f: acc[i, f], (n, m)


def _conv2d(geometry: Conv2dGeometry) -> tuple[Any, Any, _At, tuple[int, ...]]:
    g = geometry
    batch, depth, each = g.batch, g.in_channels // g.groups, g.out_channels // g.groups
    (down, across), (tap_down, tap_across) = g.strides, g.dilation
    x = te.placeholder((batch, g.in_channels, g.in_height, g.in_width), name="x")
    w = te.placeholder(_weight_shape(g), name="w")
    source = _padded(x, g)
    c = te.reduce_axis((0, depth), name="c")
    u = te.reduce_axis((0, g.kernel[0]), name="u")
    v = te.reduce_axis((0, g.kernel[1]), name="v")

    def tap(n: Any, group: Any, i: Any, j: Any) -> Any:
        channel = group * depth + c
        return source[n, channel, i * down + u * tap_down, j * across + v * tap_across]

    assert batch is not None
    shape = (batch, g.out_channels, g.out_height, g.out_width)
    if _is_channels_last(g):
        acc = te.compute(
            (batch, g.groups, g.out_height, g.out_width, each),
            lambda n, q, i, j, f: te.sum(tap(n, q, i, j) * w[q, u, v, c, f], axis=[u, v, c]),
            name="product",
        )
        return x, w, lambda n, f, i, j: acc[n, f // each, i, j, f % each], shape
    acc = te.compute(
        shape,
        lambda n, f, i, j: te.sum(tap(n, f // each, i, j) * w[f, c, u, v], axis=[c, u, v]),
        name="product",
    )
    return x, w, lambda n, f, i, j: acc[n, f, i, j], shape


def _padded(x: Any, geometry: Conv2dGeometry) -> Any:
    if not any(geometry.padding):
        return x
    top, left, bottom, right = geometry.padding
    batch, channels, height, width = x.shape

    def value(n: Any, c: Any, i: Any, j: Any) -> Any:
        inside = tirx.all(i >= top, i < top + height, j >= left, j < left + width)
        zero = tirx.const(0.0, "float32")
        return tirx.if_then_else(inside, x[n, c, i - top, j - left], zero)

    padded = (batch, channels, height + top + bottom, width + left + right)
    return te.compute(padded, value, name="padded")


def _is_channels_last(geometry: Conv2dGeometry) -> bool:
    """Whether products are summed up with the output channels of a group side by side.

    Vectors of channels are whole whatever the width of the image, their weights lie side by side,
    and each value of x is broadcast: in NCHW the same search finds kernels half as fast.
    """
    return geometry.out_channels // geometry.groups >= _CHANNELS_OF_A_VECTOR


def _weight_shape(geometry: Conv2dGeometry) -> tuple[int, ...]:
    g = geometry
    depth, each = g.in_channels // g.groups, g.out_channels // g.groups
    if _is_channels_last(g):
        return (g.groups, *g.kernel, depth, each)
    return (g.out_channels, depth, *g.kernel)


def weight_argument(workload: Workload, packed: PackedWeight) -> np.ndarray:
    """Lay a plain weight out as `unscheduled` reads it.

    Returns
    -------
    numpy.ndarray
        [k, m] for a matrix product. For a convolution [groups, kernel height, kernel width, input
        channels of a group, output channels of a group], or OIHW where a group has few outputs.
    """
    matrix = packed.arrays["values"].reshape(packed.shape)
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        return np.ascontiguousarray(matrix.T)
    assert isinstance(geometry, Conv2dGeometry)
    g = geometry
    if not _is_channels_last(g):
        return matrix.reshape(_weight_shape(g))
    by_group = matrix.reshape(g.groups, -1, g.in_channels // g.groups, *g.kernel)
    return np.ascontiguousarray(by_group.transpose(0, 3, 4, 2, 1))


def _with_epilogue(
    epilogue: Epilogue,
    shape: tuple[int, ...],
    acc: _At,
    channels: Sequence[Any],
    tensors: Sequence[Any],
) -> Any:
    """Write the epilogue as one block, cut where an expression would grow out of hand.

    A polynomial gets a block of its own, unless it ends the epilogue: TVM's code generator puts the
    values of variables into what uses them, so that a polynomial of a polynomial takes minutes. A
    value that is used several times would be computed again at each use.
    """
    uses = Counter(r.index for op in epilogue.ops for r in op.inputs if r.kind == "node")
    nodes: list[_At] = []
    sizes: list[int] = []

    def value(ref: EpilogueRef, at: tuple[Any, ...]) -> Any:
        if ref.kind == "node":
            return nodes[ref.index](*at)
        if ref.kind == "scalar":
            return tirx.const(ref.value, "float32")
        if ref.kind == "channel":
            return channels[ref.index][at[1]]
        return tensors[ref.index][at] if ref.kind == "tensor" else acc(*at)

    def node_of(op: EpilogueOp) -> _At:
        return lambda *at: EMITTERS[op.name]([value(ref, at) for ref in op.inputs], 1)

    for index, op in enumerate(epilogue.ops[:-1]):
        node = node_of(op)
        size = 1 + sum(sizes[ref.index] for ref in op.inputs if ref.kind == "node")
        if op.name in vector_math.FUNCTIONS or (uses[index] > 1 and size > _LARGEST_COPIED):
            stage = te.compute(shape, node, name=f"step{index}")
            node, size = _reader(stage), 0
        nodes.append(node)
        sizes.append(size)
    return te.compute(shape, node_of(epilogue.ops[-1]) if epilogue.ops else acc, name="y")


def _reader(tensor: Any) -> _At:
    return lambda *at: tensor[at]


def trace_text(schedule: Schedule) -> str:
    """Return the steps that a schedule took as JSON, postprocessing included."""
    # `as_json` leaves TVM's numbers in it, which `json` does not know.
    return json.dumps(schedule.trace.as_json(), default=lambda number: number.value)


def build_metaschedule(
    workload: Workload, machine: X86Machine, packed: PackedWeight | None, config: Config
) -> tirx.PrimFunc:
    """Build a dense kernel from the trace of a schedule.

    Parameters
    ----------
    workload : Workload
        What the trace was found for.
    machine : X86Machine
        Not read: the trace says everything.
    packed : PackedWeight, optional
        Not read: the weight is an argument.
    config : mapping
        ``trace`` is the text that `trace_text` gave.

    Returns
    -------
    PrimFunc
        With the arguments of `unscheduled`; on at most `workload.threads` threads.

    Raises
    ------
    ValueError
        When the trace does not fit the workload.
    """
    schedule = Schedule(tvm.IRModule({"main": unscheduled(workload)}))
    _replay(schedule, config["trace"])
    function = _limited(schedule.mod["main"], workload.threads)
    return function.with_attrs({"op_pattern": _OPAQUE, "tirx.is_scheduled": True})


def _replay(schedule: Schedule, text: str) -> None:
    try:
        steps = json.loads(text)
        Trace.apply_json_to_schedule(steps, schedule)
    except Exception as error:
        # TVM raises whatever its checks raise: the classes differ from step to step.
        raise ValueError(
            "the trace does not apply to this layer: it is damaged, or of another one"
        ) from error
    # Tile sizes that do not divide a loop are mended silently: another kernel than was measured.
    if json.loads(trace_text(schedule)) != steps:
        raise ValueError("the trace was found for a layer of another shape")


def _limited(function: tirx.PrimFunc, threads: int) -> tirx.PrimFunc:
    """Cut parallel loops into one piece a thread: TVM gives any parallel loop the whole pool."""

    def serial(loop: tirx.For, first: Any, count: Any) -> tirx.For:
        return tirx.For(
            loop.loop_var,
            first,
            count,
            tirx.ForKind.SERIAL,
            loop.body,
            annotations=loop.annotations,
        )

    def cut(loop: tirx.For) -> tirx.For:
        if int(loop.kind) != tirx.ForKind.PARALLEL:
            return loop
        extent = int(loop.extent)
        if threads == 1:
            return serial(loop, loop.min, loop.extent)
        if extent <= threads:
            return loop
        thread = tirx.Var("thread", str(loop.loop_var.ty))
        piece = math.ceil(extent / threads)
        first = thread * piece
        count = tirx.min(piece, extent - first)
        own = serial(loop, first, count)
        return tirx.For(thread, 0, math.ceil(extent / piece), tirx.ForKind.PARALLEL, own)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, cut)))


def _supports(workload: Workload, machine: X86Machine | None = None) -> Match:
    geometry = workload.geometry
    if isinstance(geometry, MatmulGeometry):
        if geometry.layout == "panels":
            return Match(False, "takes activations in rows, not in panels")
        if geometry.n is None:
            return Match(False, "a schedule needs a known number of tokens")
        return Match(True)
    if not isinstance(geometry, Conv2dGeometry):
        return Match(False, "only for matrix products and convolutions")
    if geometry.batch is None:
        return Match(False, "a schedule needs a known number of images")
    return Match(True)


def _no_space(workload: Workload, machine: X86Machine) -> list[Config]:
    return []


def _no_events(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> Mapping[str, float]:
    return {}


def _no_estimate(
    workload: Workload, machine: X86Machine, profile: SparsityProfile, config: Config
) -> float:
    return math.inf


def _arguments(workload: Workload, packed: PackedWeight) -> list[np.ndarray]:
    return [weight_argument(workload, packed)]


# It has no configuration of its own: a record brings one, and nothing is known of it before.
METASCHEDULE = KernelTemplate(
    name="metaschedule",
    format="plain",
    supports=_supports,
    space=_no_space,
    build=build_metaschedule,
    events=_no_events,
    estimate=_no_estimate,
    arguments=_arguments,
)
