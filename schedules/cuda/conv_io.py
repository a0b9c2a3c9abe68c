"""Images in NCHW around a tile of a GPU kernel: a window of the padded input in shared memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Conv2dGeometry, Epilogue
from .results import Results
from .row_tiles import TileShape
from .threads import WARP, Threads, local


class ConvTile:
    """A rectangle of output pixels; a lane sums up every 32nd of them.

    Shared memory holds the window of the input that they see, channel by channel, with zeros where
    the padding is: stride, dilation and one-sided padding are only other offsets.
    """

    def __init__(self, geometry: Conv2dGeometry, epilogue: Epilogue, shape: TileShape) -> None:
        self.geometry, self.shape = geometry, shape
        self.batch = tirx.Var("n", "int64") if geometry.batch is None else geometry.batch
        g = geometry
        out = (self.batch, g.out_channels, g.out_height, g.out_width)
        self.results = Results(epilogue, g.out_channels, out)
        self.taps = g.kernel[0] * g.kernel[1]
        self.channels = shape.kb // self.taps
        self.tile_w = tile_width(geometry, shape.width)
        self.tile_h = shape.width // self.tile_w
        self.window_h = _reach(self.tile_h, g.strides[0], g.kernel[0], g.dilation[0])
        self.window_w = _reach(self.tile_w, g.strides[1], g.kernel[1], g.dilation[1])
        self.pitch = self._pitch()

    def _pitch(self) -> int:
        """Space the window's rows so that the lanes of a warp read different banks.

        Where a warp covers several rows of pixels, each row has to begin where the one before it
        ended, modulo the banks.
        """
        if self.tile_w >= WARP:
            return self.window_w
        step = self.geometry.strides[0]
        wanted = self.tile_w * self.geometry.strides[1] % WARP
        fitting = (
            w for w in range(self.window_w, self.window_w + WARP) if w * step % WARP == wanted
        )
        return next(fitting, self.window_w)

    @property
    def shared_floats(self) -> int:
        """The staged window; results go out straight."""
        return self.channels * self.window_h * self.pitch

    @property
    def registers_a_column(self) -> int:
        """Registers beside the sums that each column of a lane takes."""
        return 20

    def declare_input(self) -> None:
        """Declare x."""
        g = self.geometry
        shape = (self.batch, g.in_channels, g.in_height, g.in_width)
        self.x = B.arg("x", B.Buffer(shape, "float32"))

    def declare_output(self) -> None:
        """Declare what the epilogue reads, and y."""
        self.results.declare()

    def grid(self) -> dict[str, Any]:
        """Rectangles of pixels, and images."""
        return {"y": self._across * -(-self.geometry.out_height // self.tile_h), "z": self.batch}

    @property
    def _across(self) -> int:
        return -(-self.geometry.out_width // self.tile_w)

    def begin(self, numbers: Sequence[Any], threads: Threads) -> None:
        """Prepare a rectangle: where its pixels read in the window."""
        g, number = self.geometry, T.Cast("int32", numbers[0])
        self.image, self.threads = numbers[1], threads
        self.top = T.floordiv(number, self._across) * self.tile_h
        self.left = T.floormod(number, self._across) * self.tile_w
        self.bases = local(self.shape.nt, "int32")
        for t in range(self.shape.nt):
            down, along = self._pixel(t)
            place = down * (g.strides[0] * self.pitch) + along * g.strides[1]
            B.buffer_store(self.bases, place, [t])

    def _pixel(self, t: int) -> tuple[Any, Any]:
        number = self.threads.lane + WARP * t
        return T.floordiv(number, self.tile_w), T.floormod(number, self.tile_w)

    def stage(self, memory: Any, block: Any) -> None:
        """Copy the window of some channels."""
        g, size = self.geometry, self.window_h * self.window_w
        with self.threads.share(self.channels * size) as i:
            channel, rest = T.floordiv(i, size), T.floormod(i, size)
            down, along = T.floordiv(rest, self.window_w), T.floormod(rest, self.window_w)
            c = block * self.channels + channel
            iy = self.top * g.strides[0] - g.padding[0] + down
            ix = self.left * g.strides[1] - g.padding[1] + along
            inside = [iy >= 0, iy < g.in_height, ix >= 0, ix < g.in_width, c < g.in_channels]
            condition = inside[0]
            for more in inside[1:]:
                condition = T.And(condition, more)
            value = T.if_then_else(condition, self.x[self.image, c, iy, ix], T.float32(0))
            B.buffer_store(memory, value, [(channel * self.window_h + down) * self.pitch + along])

    def offset(self, column: Any) -> Any:
        """Tell how far a tap of a channel is from the pixel's first."""
        g = self.geometry
        channel, tap = T.floordiv(column, self.taps), T.floormod(column, self.taps)
        down, along = T.floordiv(tap, g.kernel[1]), T.floormod(tap, g.kernel[1])
        row = channel * self.window_h + down * g.dilation[0]
        return row * self.pitch + along * g.dilation[1]

    def multiply(self, memory: Any, sums: Any, turn: int, value: Any, at: Any) -> None:
        """Add the products of a lane's pixels."""
        for t in range(self.shape.nt):
            mine = turn * self.shape.nt + t
            B.buffer_store(sums, sums[mine] + value * memory[self.bases[t] + at], [mine])

    def store(self, memory: Any, sums: Any, rows: Sequence[Any], tile: Any) -> None:
        """Write pixels, which are neighbours in memory as they are in a warp."""
        g, nt = self.geometry, self.shape.nt
        for turn, row in enumerate(rows):
            for t in range(nt):
                down, along = self._pixel(t)
                oy, ox = self.top + down, self.left + along
                inside = T.And(T.And(oy < g.out_height, ox < g.out_width), row < g.out_channels)
                with B.If(inside), B.Then():
                    self.results.store(sums[turn * nt + t], row, [self.image, row, oy, ox])


def tile_width(geometry: Conv2dGeometry, width: int) -> int:
    """Choose how wide a rectangle of `width` pixels is: the power of two that wastes the fewest."""
    fitting = [1 << bit for bit in range(int(math.log2(width)) + 1)]

    def computed(across: int) -> tuple[int, int]:
        down = width // across
        covered = -(-geometry.out_width // across) * -(-geometry.out_height // down)
        # Of equal ones, the most nearly square: its window is the smallest.
        return covered, abs(across - down)

    return min(fitting, key=computed)


def _reach(pixels: int, stride: int, taps: int, dilation: int) -> int:
    return (pixels - 1) * stride + (taps - 1) * dilation + 1
