"""A dense convolution of small images: vectors of output channels, pixels one by one.

Pixels side by side fill vectors badly where they are few, 49 of them three and a sixteenth. Here a
register tile is some pixels times some vectors of channels: a step loads the channels' weights and
spreads one activation for every pixel. Activations are read where they lie, in the image or in its
padded copy; what is summed up lies channel by channel and is transposed in the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ...workload import Conv2dGeometry, Epilogue
from ..vectors import Vectors
from .conv_io import ConvIO
from .pixel_tiles import PixelTiles, Rectangle
from .register_tile import RegisterTile
from .squares import transposed


@dataclass(frozen=True)
class ChannelShape:
    """The sizes that the kernel is specialised to.

    Attributes
    ----------
    vectors : int
        Vectors of output channels in a panel of the weight.
    pixels : int
        Pixels of a register tile, at most.
    channels : int
        Input channels of a block, whose weights stay in a cache from tile to tile.
    lanes, threads : int
        Elements of a vector, and threads that share the panels.
    """

    vectors: int
    pixels: int
    channels: int
    lanes: int
    threads: int

    @property
    def panel(self) -> int:
        """Output channels of a panel."""
        return self.vectors * self.lanes


def channel_conv2d(
    geometry: Conv2dGeometry, shape: ChannelShape, epilogue: Epilogue
) -> tirx.PrimFunc:
    """Build the PrimFunc: arguments x, values, epilogue vectors, epilogue tensors, y.

    The weight is packed in `dense` panels of `shape.panel` rows.
    """
    io = ConvIO(geometry, epilogue, shape.lanes, shape.panel, geometry.weight_shape[1])
    panels = math.ceil(geometry.out_channels // geometry.groups / shape.panel)
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("conv")
            B.func_attr({"tirx.noalias": True, "op_pattern": 8})
            io.declare_input()
            length = geometry.groups * panels * geometry.weight_shape[1] * shape.panel
            values = B.arg("values", B.Buffer((length,), "float32"))
            io.declare_output()
            io.open_views()
            emitter = _Emitter(io, shape, values, panels)
            if shape.threads > 1:
                share = math.ceil(panels / shape.threads)
                with B.parallel(0, shape.threads) as thread:
                    first = thread * share
                    emitter.images(first, T.max(0, T.min(share, panels - first)))
            else:
                emitter.images(0, panels)
    return builder.get()


class _Emitter:
    def __init__(self, io: ConvIO, shape: ChannelShape, values: Any, panels: int) -> None:
        self.io, self.shape, self.values, self.panels = io, shape, values, panels
        self.geometry, self.vectors = io.geometry, Vectors(shape.lanes)
        self.tiles = PixelTiles(self.geometry.out_height, self.geometry.out_width, shape.pixels)
        self.blocks = math.ceil(self.geometry.in_channels / shape.channels)

    def images(self, first: Any, count: Any) -> None:
        """Multiply all images with `count` panels of every group from `first` on."""
        size = math.ceil(self.geometry.pixels / self.shape.lanes) * self.shape.lanes
        self.sums = B.alloc_buffer((size * self.shape.panel,), "float32", scope="global")
        with B.serial(0, self.io.images()) as image:
            self.io.prepare(image, 0, [(0, self.geometry.pixels)])
            with B.serial(0, count) as step:
                self._panel(image, first + step)

    def _panel(self, image: Any, panel: Any) -> None:
        with B.serial(0, self.blocks) as block:
            self.tiles.emit(lambda rectangle: self._tile(image, panel, block, rectangle))
        with B.serial(0, math.ceil(self.geometry.pixels / self.shape.lanes)) as square:
            with B.serial(0, self.shape.vectors) as vector:
                self._store(image, panel * self.shape.vectors + vector, vector, square)

    def _tile(self, image: Any, panel: Any, block: Any, rectangle: Rectangle) -> None:
        """Add a block of input channels to the sums of some pixels."""
        g, width = self.geometry, self.shape.panel
        pixels = rectangle.pixels
        tile = RegisterTile(self.vectors, len(pixels), self.shape.vectors)
        tile.clear()
        taps = math.prod(g.kernel)
        start = (self.io.group(image) * self.panels + panel) * g.in_channels
        with B.serial(0, self._block_length(block)) as step, B.serial(0, g.kernel[0]) as row:
            channel = block * self.shape.channels + step
            weight = ((start + channel) * taps + row * g.kernel[1]) * width
            for column in range(g.kernel[1]):
                self._multiply(tile, image, channel, (row, column), rectangle, weight)
                weight = weight + width
        at = lambda r: (pixels[r][0] * g.out_width + pixels[r][1]) * width  # noqa: E731
        if self.blocks > 1:
            with B.If(block > 0), B.Then():
                tile.add(self.sums, at)
        tile.write(self.sums, at)

    def _multiply(
        self,
        tile: RegisterTile,
        image: Any,
        channel: Any,
        tap: tuple[Any, int],
        rectangle: Rectangle,
        weight: Any,
    ) -> None:
        source, base, row_stride = self.io.tap(image, channel, *tap)
        base = base + rectangle.top * row_stride + rectangle.left
        offsets = [y * row_stride + x for y in range(rectangle.height)
                   for x in range(rectangle.width)]  # fmt: skip
        tile.multiply(
            list(range(tile.mr)),
            lambda q: self.vectors.splat(source[base + offsets[q]]),
            self.values,
            weight,
        )

    def _block_length(self, block: Any) -> Any:
        most, channels = self.shape.channels, self.geometry.in_channels
        if channels % most == 0:
            return most
        return T.min(T.int32(most), channels - block * most)

    def _store(self, image: Any, channels: Any, vector: Any, square: Any) -> None:
        """Transpose a vector of pixels with one of channels, and store a run for each channel."""
        v, count = self.vectors, self.geometry.out_channels
        first = square * v.lanes
        rows = [
            v.keep(v.load(self.sums, (first + i) * self.shape.panel + vector * v.lanes))
            for i in range(v.lanes)
        ]
        runs = transposed(v, rows)
        low = channels * v.lanes
        left = T.max(0, T.min(count - low, v.lanes)) if count % self.shape.panel else v.lanes
        with B.serial(0, left) as i:
            self.io.store_run(v.lanes, low + i, image, first, runs, i * v.lanes)
