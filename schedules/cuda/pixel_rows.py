"""Convolutions for tensor cores: taps of channels are gathered rows, pixels their columns.

The matrix of taps is never in memory (implicit GEMM): a chunk's rows are read from the image, with
zeros where the padding is. A 1x1 convolution without padding in steps of one reads whole pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Conv2dGeometry, Epilogue
from .gathered_columns import GatheredColumns, copied_at_once
from .results import Results
from .slabs import RowOf, store_feature_rows
from .tensor_tiles import TensorShape
from .token_rows import tiles_of

# Bits of an entry that hold how far a tap is to the right; those above say how far down.
_RIGHT_BITS = 16


def reads_pixels_in_order(geometry: Conv2dGeometry) -> bool:
    """Whether output pixels are input pixels, one by one."""
    return (geometry.kernel, geometry.strides, geometry.padding) == ((1, 1), (1, 1), (0, 0, 0, 0))


def tap_entries(geometry: Conv2dGeometry, columns: np.ndarray) -> np.ndarray:
    """Turn columns of the weight into what the kernel reads: the channel, and where the tap is."""
    if reads_pixels_in_order(geometry):
        return columns
    channel, tap = np.divmod(columns, math.prod(geometry.kernel))
    down, right = np.divmod(tap, geometry.kernel[1])
    place = down * geometry.dilation[0] << _RIGHT_BITS | right * geometry.dilation[1]
    return np.stack([channel, place], axis=1).astype(np.int32).reshape(-1)


class PixelRows(GatheredColumns):
    """A tile of pixels in their order, one image behind the other."""

    def __init__(self, geometry: Conv2dGeometry, epilogue: Epilogue, shape: TensorShape) -> None:
        self.in_order = reads_pixels_in_order(geometry)
        extent = geometry.pixels if self.in_order else None
        super().__init__(shape, copied_at_once(extent, shape.element_bytes))
        self.entry_words = 1 if self.in_order else 2
        self.geometry = g = geometry
        self.batch = tirx.Var("n", "int64") if g.batch is None else g.batch
        self.pixels = self.batch * g.pixels
        self.whole = g.batch is not None and g.batch * g.pixels % shape.nt == 0
        out = (self.batch, g.out_channels, g.out_height, g.out_width)
        self.results = Results(epilogue, g.out_channels, out, shape.dtype)

    def declare_input(self) -> None:
        """Declare x."""
        g = self.geometry
        shape = (self.batch, g.in_channels, g.in_height, g.in_width)
        self.x = B.arg("x", B.Buffer(shape, self.shape.dtype))

    def grid(self) -> dict[str, Any]:
        """Tiles of pixels."""
        g = self.geometry
        static = None if g.batch is None else g.batch * g.pixels
        return {"y": tiles_of(static, self.pixels, self.shape.nt)}

    def source(self, entry: Sequence[Any], column: Any) -> tuple[Any, Any]:
        """Find what a pixel sees at a tap."""
        g, pixel = self.geometry, self.first + column
        is_pixel = None if self.whole else pixel < self.pixels
        image, down, along = self._place_of(pixel)
        if self.in_order:
            return self.x[image, entry[0], down, along], is_pixel
        y = down * g.strides[0] - g.padding[0] + T.shift_right(entry[1], T.int32(_RIGHT_BITS))
        right = T.bitwise_and(entry[1], T.int32((1 << _RIGHT_BITS) - 1))
        x = along * g.strides[1] - g.padding[1] + right
        inside = T.And(T.And(y >= 0, y < g.in_height), T.And(x >= 0, x < g.in_width))
        if is_pixel is not None:
            inside = T.And(inside, is_pixel)
        return self.x[image, entry[0], y, x], inside

    def _place_of(self, pixel: Any) -> tuple[Any, Any, Any]:
        """Tell a pixel's image, and its place there."""
        g = self.geometry
        inside = T.floormod(pixel, g.pixels)
        down, along = T.floordiv(inside, g.out_width), T.floormod(inside, g.out_width)
        return T.floordiv(pixel, g.pixels), down, along

    def store(self, slab: Any, row_of: RowOf) -> None:
        """Write the results of a slab."""
        g = self.geometry

        def index(row: Any, pixel: Any) -> list[Any]:
            image, down, along = self._place_of(pixel)
            return [image, row, down, along]

        store_feature_rows(
            slab,
            self.shape,
            self.threads,
            self.results,
            row_of,
            (self.first, self.pixels),
            index,
            paired=g.out_width % 2 == 0,
        )
