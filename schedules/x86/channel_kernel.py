"""A dense kernel for few pixels or tokens: vectors of output channels, pixels one by one.

Pixels side by side fill vectors badly where they are few, 49 of them three and a sixteenth. Here a
register tile is some pixels times some vectors of channels: a step loads the channels' weights and
spreads one activation for every pixel. Activations are read where they lie. A block of a panel's
weights meets all pixels while it is in a cache; meanwhile the next one is fetched, since weights
are what such a layer waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ..vectors import Vectors
from .pixel_tiles import PixelTiles, Rectangle
from .register_tile import RegisterTile


@dataclass(frozen=True)
class ChannelShape:
    """The sizes that the kernel is specialised to.

    Attributes
    ----------
    rows : int
        Output channels of a group.
    depth : int
        Input channels of a group.
    kernel : tuple of int
        Taps of an input channel.
    groups : int
        Groups of channels, each with a weight of its own.
    vectors : int
        Vectors of output channels in a panel of the weight.
    block : int
        Input channels of a block of weights.
    lanes, threads : int
        Elements of a vector, and threads that share the panels.
    """

    rows: int
    depth: int
    kernel: tuple[int, int]
    groups: int
    vectors: int
    block: int
    lanes: int
    threads: int

    @property
    def width(self) -> int:
        """Output channels of a panel."""
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        """Panels of a group."""
        return math.ceil(self.rows / self.width)

    @property
    def blocks(self) -> int:
        """Blocks of a panel."""
        return math.ceil(self.depth / self.block)

    @property
    def channel(self) -> int:
        """Weights of an input channel in a panel."""
        return math.prod(self.kernel) * self.width

    @property
    def size(self) -> int:
        """Elements of the packed weight."""
        return self.groups * self.panels * self.depth * self.channel


@dataclass(frozen=True)
class Activations:
    """Where the activations of one tap of one channel lie: `at` is the first pixel's place.

    The next pixel lies `step` behind, the next row of them `row_step`.
    """

    buffer: Any
    at: Any
    row_step: int
    step: int


class ChannelIO(Protocol):
    """How one operator feeds and drains the kernel."""

    def declare_input(self) -> None:
        """Declare the activations, the first argument."""

    def declare_weight(self, size: int) -> Any:
        """Declare the weight's arrays, and return its values, of `size` elements."""

    def declare_output(self) -> None:
        """Declare the epilogue's operands and the result, the last arguments."""

    def open_views(self) -> None:
        """Alias the arguments of several dimensions as flat buffers, once all are declared."""

    @property
    def keeps_panels(self) -> bool:
        """Whether all panels of an image are kept, and stored together."""

    def images(self) -> Any:
        """How often the whole product runs, each time on its own pixels: images, times groups."""

    def group(self, image: Any) -> Any:
        """Which group's weight an image is multiplied with."""

    def prepare_whole(self, image: Any) -> None:
        """Emit what comes before an image is read."""

    def tap(self, image: Any, channel: Any, y: Any, x: int) -> Activations:
        """Tell where a tap of an image's channel lies."""

    def drain(self, image: Any, sums: Any, shape: ChannelShape, panel: Any) -> None:
        """Emit the store of a panel of results, which `sums` holds as [pixel][shape.width]."""

    def drain_panels(self, image: Any, sums: Any, shape: ChannelShape) -> None:
        """Emit the store of all panels, which `sums` holds as [pixel][panel][shape.width]."""


def build_channel_kernel(name: str, shape: ChannelShape, io: ChannelIO, tiles: PixelTiles) -> Any:
    """Build the PrimFunc: arguments x, the weight's, epilogue vectors, epilogue tensors, y.

    The weight is packed in `dense` panels of `shape.width` rows.
    """
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name(name)
            B.func_attr({"tirx.noalias": True, "op_pattern": 8})
            io.declare_input()
            values = io.declare_weight(shape.size)
            io.declare_output()
            io.open_views()
            _Emitter(shape, io, tiles, values).emit()
    return builder.get()


class PanelByPanel:
    """What operators have in common that store each panel of a weight once it is multiplied."""

    keeps_panels = False

    def declare_weight(self, size: int) -> Any:
        """Declare the values."""
        return B.arg("values", B.Buffer((size,), "float32"))

    def drain_panels(self, image: Any, sums: Any, shape: ChannelShape) -> None:
        """Every panel was stored."""


class _Emitter:
    def __init__(self, shape: ChannelShape, io: ChannelIO, tiles: PixelTiles, values: Any) -> None:
        self.shape, self.io, self.tiles, self.values = shape, io, tiles, values
        self.vectors = Vectors(shape.lanes)

    def emit(self) -> None:
        """Multiply all images with all panels of every group."""
        if not self.io.keeps_panels:
            self._share_panels(self._images)
            return
        self._reserve_sums(self.shape.panels)
        with B.serial(0, self.io.images()) as image:
            self.io.prepare_whole(image)
            self._share_panels(lambda first, count: self._panels(image, first, count))
            self.io.drain_panels(image, self.sums, self.shape)

    def _share_panels(self, emit: Callable[[Any, Any], None]) -> None:
        """Emit what computes `count` panels from `first` on, for every thread its share."""
        s = self.shape
        if s.threads == 1:
            emit(0, s.panels)
            return
        share = math.ceil(s.panels / s.threads)
        with B.parallel(0, s.threads) as thread:
            emit(thread * share, T.max(0, T.min(share, s.panels - thread * share)))

    def _reserve_sums(self, panels: int) -> None:
        lanes = self.shape.lanes
        # Whole squares are transposed, and vectors begin anywhere in a row.
        pixels = math.ceil(self.tiles.height * self.tiles.width / lanes) * lanes
        self.stride = panels * self.shape.width
        self.sums = B.alloc_buffer((pixels * self.stride + lanes,), "float32", scope="global")

    def _images(self, first: Any, count: Any) -> None:
        self._reserve_sums(1)
        with B.serial(0, self.io.images()) as image:
            self.io.prepare_whole(image)
            self._panels(image, first, count)

    def _panels(self, image: Any, first: Any, count: Any) -> None:
        with B.serial(0, count) as step:
            panel = first + step
            with B.serial(0, self.shape.blocks) as block:
                self.tiles.emit(lambda pixels: self._tile(image, panel, block, pixels))
            if not self.io.keeps_panels:
                self.io.drain(image, self.sums, self.shape, panel)

    def _tile(self, image: Any, panel: Any, block: Any, pixels: Rectangle) -> None:
        """Add a block of input channels to the sums of some pixels."""
        s = self.shape
        tile = RegisterTile(self.vectors, pixels.height * pixels.width, s.vectors)
        tile.clear()
        self._multiply(tile, image, panel, block, pixels)
        first = (pixels.top * self.tiles.width + pixels.left) * self.stride
        if self.io.keeps_panels:
            first = first + panel * s.width
        offsets = pixels.offsets(self.tiles.width * self.stride, self.stride)
        if s.blocks > 1:
            with B.If(block > 0), B.Then():
                tile.add(self.sums, lambda r: first + offsets[r])
        tile.write(self.sums, lambda r: first + offsets[r])

    def _multiply(
        self, tile: RegisterTile, image: Any, panel: Any, block: Any, pixels: Rectangle
    ) -> None:
        s = self.shape
        length = s.block
        if s.depth % s.block:
            length = T.min(T.int32(s.block), s.depth - block * s.block)
        panels_before = self.io.group(image) * s.panels + panel
        begin = (panels_before * s.depth + block * s.block) * s.channel
        # The end of the weight has nothing behind it.
        ahead = T.min(s.block * s.channel, s.size - begin - length * s.channel)
        with B.serial(0, length) as step, B.serial(0, s.kernel[0]) as y:
            at = begin + step * s.channel + y * (s.kernel[1] * s.width)
            for x in range(s.kernel[1]):
                self._fetch(at + ahead, pixels.number)
                read = self.io.tap(image, block * s.block + step, y, x)
                self._step(tile, read, pixels, at)
                at = at + s.width

    def _step(self, tile: RegisterTile, read: Activations, pixels: Rectangle, at: Any) -> None:
        base = read.at + pixels.top * read.row_step + pixels.left * read.step
        offsets = pixels.offsets(read.row_step, read.step)
        tile.multiply(
            list(range(tile.mr)),
            lambda q: self.vectors.splat(read.buffer[base + offsets[q]]),
            self.values,
            at,
        )

    def _fetch(self, at: Any, number: Any) -> None:
        """Fetch some of a step's weights: the rectangles take turns, the last ones find it done."""
        s = self.shape
        each = math.ceil(s.vectors / self.tiles.total)
        turns = math.ceil(s.vectors / each)
        for line in range(each):
            vector = T.min(T.min(number, turns - 1) * each + line, s.vectors - 1)
            place = T.address_of(self.values[at + vector * s.lanes])
            # For reading, into the nearest cache, data.
            B.evaluate(
                T.call_llvm_intrin(
                    "void", "llvm.prefetch.p0", place, T.int32(0), T.int32(3), T.int32(1)
                )
            )
