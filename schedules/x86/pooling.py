"""Maximum and average pooling over windows of an NCHW image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import (
    Dim,
    UnsupportedShapeError,
    dense_kernel,
    maximum,
    outer_loop,
    static_product,
)
from .window_rows import WindowRow, valid_taps

_NANOSECONDS_PER_TAP_VECTOR = 0.4


@dataclass(frozen=True)
class Window:
    """A pooling window; `padding` is (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def out_size(self, axis: int, size: int) -> int:
        """Give the output's size along axis 0 (rows) or 1 (columns)."""
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        span = size + self.padding[axis] + self.padding[axis + 2] - reach
        steps = -(-span // self.strides[axis]) if self.ceil_mode else span // self.strides[axis]
        return steps + 1

    def rounds_up(self, height: int, width: int) -> bool:
        """Whether ceil_mode adds windows that pass the padding."""
        floor = Window(self.kernel, self.strides, self.padding, self.dilation)
        return any(
            self.out_size(axis, size) != floor.out_size(axis, size)
            for axis, size in enumerate((height, width))
        )


def pool2d(
    batch: Dim,
    channels: int,
    height: int,
    width: int,
    window: Window,
    machine: X86Machine,
    kind: Literal["max", "avg"] = "max",
    count_include_pad: bool = False,
) -> tirx.PrimFunc:
    """Build a pooling over windows.

    Parameters
    ----------
    batch : int or str
        Images; a name when symbolic.
    channels, height, width : int
        The rest of the shape of `x`.
    window : Window
        Size, strides, padding, dilation, and how the output's size is rounded.
    machine : X86Machine
        Gives vector width, registers and threads.
    kind : {"max", "avg"}
        Maxima keep NaN.
    count_include_pad : bool
        Averages divide by the size of the window, also at the border.

    Returns
    -------
    PrimFunc
        Parameters (x [n, c, h, w], y [n, c, oh, ow]), float32.

    Raises
    ------
    UnsupportedShapeError
        When the stride along the row is over 2, when the result is empty, or when windows that only
        exist by ceil_mode are averaged with their padding (frameworks differ there).
    """
    out_height, out_width = window.out_size(0, height), window.out_size(1, width)
    if window.strides[1] > 2:
        raise UnsupportedShapeError(f"a stride of {window.strides[1]} along the row has no kernel")
    if min(out_height, out_width) < 1:
        raise UnsupportedShapeError("the result of the pooling is empty")
    if kind == "avg" and count_include_pad and window.rounds_up(height, width):
        raise UnsupportedShapeError("ceil_mode with counted padding is left to TVM")
    result: list[Any] = []
    with dense_kernel(f"{kind}_pool2d", result) as kernel:
        x = kernel.tensor("x", (batch, channels, height, width))
        y = kernel.tensor("y", (batch, channels, out_height, out_width))
        elements = static_product((batch, channels, out_height, out_width))
        taps = window.kernel[0] * window.kernel[1]
        cost = None
        if elements is not None:
            cost = elements * taps / machine.lanes * _NANOSECONDS_PER_TAP_VECTOR / 1e3
        row = WindowRow(
            Vectors(machine.lanes),
            width=width,
            out_width=out_width,
            taps=window.kernel[1],
            stride=window.strides[1],
            dilation=window.dilation[1],
            left=window.padding[1],
            most=machine.registers // 4,
            padding=float("-inf") if kind == "max" else 0.0,
        )
        with kernel.body():
            emitter = _Emitter(x, y, window, row, kind, count_include_pad)
            with outer_loop(y.shape[0] * y.shape[1], cost, machine.threads) as plane:
                with B.serial(0, T.int64(out_height)) as out_row:
                    emitter.row(plane, out_row, height, width, out_height, out_width)
    return result[0]


class _Emitter:
    def __init__(
        self, x: Any, y: Any, window: Window, row: WindowRow, kind: str, count_include_pad: bool
    ) -> None:
        self.x, self.y, self.window, self.walk, self.kind = x, y, window, row, kind
        self.count_include_pad = count_include_pad

    def row(
        self, plane: Any, row: Any, height: int, width: int, out_height: int, out_width: int
    ) -> None:
        window, vectors = self.window, self.walk.vectors
        start = float("-inf") if self.kind == "max" else 0.0
        y_base = (plane * out_height + row) * out_width
        taps = valid_taps(
            row, height, window.kernel[0], window.strides[0], window.dilation[0], window.padding[0]
        )

        def group(first: Any, numbers: list[int]) -> None:
            begin, end, top = taps
            totals = [vectors.register() for _ in numbers]
            for total in totals:
                vectors.store(total, vectors.splat(T.float32(start)))
            with B.serial(begin, end) as tap:
                x_row = (plane * height + top + tap * window.dilation[0]) * width
                for total, number in zip(totals, numbers, strict=True):
                    for _, value in self.walk.loads(self.x.flat, x_row, first, number):
                        vectors.store(total, self._combine(vectors.load(total), value))
            for total, number in zip(totals, numbers, strict=True):
                value = self._finish(vectors.load(total), first, number, end - begin)
                self.walk.store_out(self.y.flat, value, y_base, first, number)

        self.walk.groups(group)

    def _combine(self, total: Any, value: Any) -> Any:
        if self.kind == "max":
            return maximum(total, value, self.walk.vectors.lanes)
        return total + value

    def _finish(self, total: Any, first: Any, number: int, rows: Any) -> Any:
        if self.kind == "max":
            return total
        vectors = self.walk.vectors
        if self.count_include_pad:
            return total * vectors.splat(
                T.float32(1.0 / (self.window.kernel[0] * self.window.kernel[1]))
            )
        counts = self.walk.valid_counts(first, number)
        return total / (counts * vectors.splat(T.Cast("float32", rows)))
