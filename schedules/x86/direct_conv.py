"""Direct convolution in NCHW, one output plane at a time, vectors along the output row.

The right thing for few input channels per output: depthwise and grouped convolutions.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
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


def direct_conv2d(
    geometry: Conv2dGeometry, machine: X86Machine, epilogue: Epilogue | None = None
) -> tirx.PrimFunc:
    """Build a convolution with any number of groups, with its epilogue.

    Parameters
    ----------
    geometry : Conv2dGeometry
        Channels in and out are multiples of the groups.
    machine : X86Machine
        Gives vector width, registers and threads.
    epilogue : Epilogue, optional
        Elementwise operations on the result.

    Returns
    -------
    PrimFunc
        Parameters (x [n, c, h, w], w [o, c / groups, kh, kw], one vector [o] per epilogue channel,
        one tensor of the result's shape per epilogue tensor, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When the groups do not fit the channels, the stride along the row is over 2, or the result
        is empty.
    """
    epilogue = epilogue or Epilogue()
    _require_supported(geometry)
    name = "depthwise_conv2d" if geometry.is_depthwise else "direct_conv2d"
    batch = "n" if geometry.batch is None else geometry.batch
    out_shape = (batch, geometry.out_channels, geometry.out_height, geometry.out_width)
    result: list[Any] = []
    with dense_kernel(name, result) as kernel:
        x = kernel.tensor("x", (batch, geometry.in_channels, geometry.in_height, geometry.in_width))
        w = kernel.tensor(
            "w", (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
        )
        channels = [
            kernel.tensor(f"channel{i}", (geometry.out_channels,)) for i in range(epilogue.channels)
        ]
        tensors = [kernel.tensor(f"tensor{i}", out_shape) for i in range(epilogue.tensors)]
        y = kernel.tensor("y", out_shape)
        cost = None
        if geometry.batch is not None:
            cost = geometry.macs() / machine.lanes * _NANOSECONDS_PER_TAP_VECTOR / 1e3
        with kernel.body():
            emitter = _Emitter(
                _flattened(geometry), machine, epilogue, (x, w, channels, tensors, y)
            )
            blocks = y.shape[0] * (geometry.out_channels // emitter.block)
            with outer_loop(blocks, cost, machine.threads) as block:
                emitter.planes(block)
    return result[0]


def _require_supported(geometry: Conv2dGeometry) -> None:
    if geometry.in_channels % geometry.groups or geometry.out_channels % geometry.groups:
        raise UnsupportedShapeError(f"{geometry.groups} groups do not divide the channels")
    if geometry.strides[1] > 2:
        raise UnsupportedShapeError(
            f"a stride of {geometry.strides[1]} along the row has no kernel"
        )
    if min(geometry.out_height, geometry.out_width) < 1:
        raise UnsupportedShapeError("the result of the convolution is empty")


def _flattened(geometry: Conv2dGeometry) -> Conv2dGeometry:
    """See a pointwise convolution's image as one row: rows would end in part of a vector."""
    if (*geometry.kernel, *geometry.strides) != (1, 1, 1, 1) or any(geometry.padding):
        return geometry
    width = geometry.in_height * geometry.in_width
    return replace(geometry, in_height=1, in_width=width)


def _channel_block(geometry: Conv2dGeometry) -> int:
    """Give the output channels that share their loads of the input."""
    per_group = geometry.out_channels // geometry.groups
    if geometry.in_channels == geometry.groups:
        return 1
    return next(block for block in (4, 2, 1) if per_group % block == 0)


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
        self.block = _channel_block(geometry)
        self.x, self.w, self.channels, self.tensors, self.y = tensors
        self.window = WindowRow(
            self.vectors,
            width=geometry.in_width,
            out_width=geometry.out_width,
            taps=geometry.kernel[1],
            stride=geometry.strides[1],
            dilation=geometry.dilation[1],
            left=geometry.padding[1],
            # Accumulators, one input vector and a weight fill the registers.
            most=max(1, (machine.registers - 4) // self.block)
            if self.block > 1
            else machine.registers // 2 - 2,
        )

    def planes(self, block: Any) -> None:
        """Emit one block of output channels of one image."""
        g = self.geometry
        plane = block * self.block
        channel = T.floormod(plane, T.int64(g.out_channels))
        image = T.floordiv(plane, T.int64(g.out_channels))
        group = T.floordiv(channel, T.int64(g.out_channels // g.groups))
        source = image * g.in_channels + group * (g.in_channels // g.groups)
        x_base = source * (g.in_height * g.in_width)
        with B.serial(0, T.int64(g.out_height)) as row:
            self.window.groups(
                lambda first, count: self._group(plane, channel, x_base, row, first, count)
            )

    def _group(
        self, plane: Any, channel: Any, x_base: Any, row: Any, first: Any, numbers: list[int]
    ) -> None:
        g, vectors = self.geometry, self.vectors
        sums = [[vectors.register() for _ in numbers] for _ in range(self.block)]
        for register in itertools.chain(*sums):
            vectors.store(register, vectors.zero())
        begin, end, top = valid_taps(row, g.in_height, g.kernel[0], g.strides[0], g.dilation[0],
                                     g.padding[0])  # fmt: skip
        depth = g.in_channels // g.groups
        with B.serial(0, T.int64(depth)) as c, B.serial(begin, end) as tap:
            x_row = x_base + ((c * g.in_height) + top + tap * g.dilation[0]) * g.in_width
            w_row = ((channel * depth + c) * g.kernel[0] + tap) * g.kernel[1]
            for position, number in enumerate(numbers):
                for column, value in self.window.loads(self.x.flat, x_row, first, number):
                    shared = value if self.block == 1 else vectors.keep(value)
                    for k, registers in enumerate(sums):
                        step = k * depth * g.kernel[0] * g.kernel[1]
                        weight = vectors.splat(self.w.flat[w_row + step + column])
                        total = vectors.load(registers[position]) + weight * shared
                        vectors.store(registers[position], total)
        for k, registers in enumerate(sums):
            for register, number in zip(registers, numbers, strict=True):
                self._store(plane + k, channel + k, row, register, first, number)

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
