"""Depthwise convolution in NCHW: one kernel window per channel, vectors along the output row."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...targets import X86Machine
from ...workload import Conv2dGeometry, Epilogue
from ..epilogue import emit_epilogue
from ..vectors import Vectors
from .dense_kernel import Tensor, UnsupportedShapeError, dense_kernel, outer_loop
from .window_rows import WindowRow, valid_taps

_NANOSECONDS_PER_TAP_VECTOR = 0.4


def depthwise_conv2d(
    geometry: Conv2dGeometry, machine: X86Machine, epilogue: Epilogue | None = None
) -> tirx.PrimFunc:
    """Build a depthwise convolution with its epilogue.

    Parameters
    ----------
    geometry : Conv2dGeometry
        Groups equal to the input channels; any whole number of output channels per group.
    machine : X86Machine
        Gives vector width, registers and threads.
    epilogue : Epilogue, optional
        Elementwise operations on the result.

    Returns
    -------
    PrimFunc
        Parameters (x [n, c, h, w], w [o, 1, kh, kw], one vector [o] per epilogue channel, one
        tensor of the result's shape per epilogue tensor, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When the convolution is not depthwise, its stride along the row is over 2, or it is empty.
    """
    epilogue = epilogue or Epilogue()
    _require_supported(geometry)
    batch = "n" if geometry.batch is None else geometry.batch
    out_shape = (batch, geometry.out_channels, geometry.out_height, geometry.out_width)
    result: list[Any] = []
    with dense_kernel("depthwise_conv2d", result) as kernel:
        x = kernel.tensor("x", (batch, geometry.in_channels, geometry.in_height, geometry.in_width))
        w = kernel.tensor("w", (geometry.out_channels, 1, *geometry.kernel))
        channels = [
            kernel.tensor(f"channel{i}", (geometry.out_channels,)) for i in range(epilogue.channels)
        ]
        tensors = [kernel.tensor(f"tensor{i}", out_shape) for i in range(epilogue.tensors)]
        y = kernel.tensor("y", out_shape)
        cost = None
        if geometry.batch is not None:
            cost = geometry.macs() / machine.lanes * _NANOSECONDS_PER_TAP_VECTOR / 1e3
        with kernel.body():
            emitter = _Emitter(geometry, machine, epilogue, (x, w, channels, tensors, y))
            planes = y.shape[0] * y.shape[1]
            with outer_loop(planes, cost, machine.threads) as plane:
                emitter.plane(plane)
    return result[0]


def _require_supported(geometry: Conv2dGeometry) -> None:
    if geometry.groups != geometry.in_channels or geometry.out_channels % geometry.groups:
        raise UnsupportedShapeError("the convolution is not depthwise")
    if geometry.strides[1] > 2:
        raise UnsupportedShapeError(
            f"a stride of {geometry.strides[1]} along the row has no kernel"
        )
    if min(geometry.out_height, geometry.out_width) < 1:
        raise UnsupportedShapeError("the result of the convolution is empty")


class _Emitter:
    def __init__(
        self,
        geometry: Conv2dGeometry,
        machine: X86Machine,
        epilogue: Epilogue,
        tensors: tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor],
    ) -> None:
        self.geometry = geometry
        self.vectors = Vectors(machine.lanes)
        self.epilogue = epilogue
        self.x, self.w, self.channels, self.tensors, self.y = tensors
        self.window = WindowRow(
            self.vectors,
            width=geometry.in_width,
            out_width=geometry.out_width,
            taps=geometry.kernel[1],
            stride=geometry.strides[1],
            dilation=geometry.dilation[1],
            left=geometry.padding[1],
            most=machine.registers // 2 - 2,
        )

    def plane(self, plane: Any) -> None:
        """Emit one output channel of one image."""
        g = self.geometry
        channel = T.floormod(plane, T.int64(g.out_channels))
        source = plane
        if g.out_channels != g.in_channels:
            per_group = T.int64(g.out_channels // g.in_channels)
            source = T.floordiv(plane, per_group)
        x_base = source * (g.in_height * g.in_width)
        with B.serial(0, T.int64(g.out_height)) as row:
            self.window.groups(
                lambda first, count: self._group(plane, channel, x_base, row, first, count)
            )

    def _group(
        self, plane: Any, channel: Any, x_base: Any, row: Any, first: Any, numbers: list[int]
    ) -> None:
        g, vectors = self.geometry, self.vectors
        sums = [vectors.register() for _ in numbers]
        for register in sums:
            vectors.store(register, vectors.zero())
        begin, end, top = valid_taps(row, g.in_height, g.kernel[0], g.strides[0], g.dilation[0],
                                     g.padding[0])  # fmt: skip
        with B.serial(begin, end) as tap:
            x_row = x_base + (top + tap * g.dilation[0]) * g.in_width
            w_row = (channel * g.kernel[0] + tap) * g.kernel[1]
            for register, number in zip(sums, numbers, strict=True):
                loads = self.window.loads(self.x.flat, x_row, first, number)
                for column, value in loads:
                    weight = vectors.splat(self.w.flat[w_row + column])
                    vectors.store(register, vectors.load(register) + weight * value)
        for register, number in zip(sums, numbers, strict=True):
            self._store(plane, channel, row, register, first, number)

    def _store(
        self, plane: Any, channel: Any, row: Any, register: Any, first: Any, number: int
    ) -> None:
        g, vectors = self.geometry, self.vectors
        base = (plane * g.out_height + row) * g.out_width
        value = emit_epilogue(
            self.epilogue,
            vectors.load(register),
            lambda i: vectors.splat(self.channels[i].flat[channel]),
            lambda i: self.window.load_out(self.tensors[i].flat, base, first, number),
            vectors.lanes,
        )
        self.window.store_out(self.y.flat, value, base, first, number)
