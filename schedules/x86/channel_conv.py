"""Convolution around the channel kernel: NCHW in, results transposed into NCHW."""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from .channel_kernel import Activations, ChannelShape, PanelByPanel
from .conv_io import ConvIO
from .squares import transposed


class ChannelConv(PanelByPanel, ConvIO):
    """X [n][ic][ih][iw] in, Y [n][oc][oh][ow] out; any tap is read from the padded image."""

    def prepare_whole(self, image: Any) -> None:
        """Copy the image into its padded form."""
        self.prepare(image, 0, [(0, self.geometry.pixels)])

    def tap(self, image: Any, channel: Any, y: Any, x: int) -> Activations:
        """Tell where a tap of an image's channel lies."""
        g, p = self.geometry, self.padded
        if not p.needed:
            return Activations(self.x, self.plane(image, channel) * g.pixels, g.out_width, 1)
        return Activations(
            self.source, p.channel_offset(channel) + p.tap_offset(y, x), p.row_stride, 1
        )

    def drain(self, image: Any, sums: Any, shape: ChannelShape, panel: Any) -> None:
        """Transpose squares of pixels and channels, and store a run of each channel's pixels."""
        squares = math.ceil(self.geometry.pixels / shape.lanes)
        with B.serial(0, squares) as square, B.serial(0, shape.vectors) as vector:
            low = panel * shape.width + vector * shape.lanes
            self._store_square(image, sums, shape, low, vector, square)

    def row_of(self, slot: Any) -> Any:
        """Tell which output channel a row of the weight is."""
        return slot

    def _store_square(
        self, image: Any, sums: Any, shape: ChannelShape, low: Any, vector: Any, square: Any
    ) -> None:
        v, first = self.vectors, square * shape.lanes
        runs = transposed(
            v,
            [
                v.keep(v.load(sums, (first + i) * shape.width + vector * v.lanes))
                for i in range(v.lanes)
            ],
        )
        count = T.max(0, T.min(shape.rows - low, v.lanes)) if shape.rows % shape.width else v.lanes
        with B.serial(0, count) as i:
            self.store_run(v.lanes, self.row_of(low + i), image, first, runs, i * v.lanes)
