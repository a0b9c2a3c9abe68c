"""The channel kernel on what is left of a weight whose channels were pruned.

Activations of live channels are gathered where they are read anyway: a feature's address comes from
a list, and images are padded a live channel at a time. Results of live rows are spread over all
rows when they are stored; the others get what the epilogue makes of zero.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...formats.compact_channels import MOST_LANES
from ...workload import Conv2dGeometry, Epilogue, MatmulGeometry
from .channel_conv import ChannelConv
from .channel_kernel import Activations, ChannelShape
from .channel_matmul import ChannelMatmul
from .conv_io import PaddedImage
from .dense_kernel import thread_loop
from .matmul_io import store_features
from .streamed_weights import PERMUTES


class CompactMatmul(ChannelMatmul):
    """Row-major around live features: results are spread once all of them are there."""

    keeps_panels = True

    def __init__(
        self,
        live: int,
        geometry: MatmulGeometry,
        epilogue: Epilogue,
        lanes: int,
        mr: int,
        kb: int,
    ) -> None:
        super().__init__(geometry, epilogue, lanes, mr, kb)
        self.live_features = live

    def declare_weight(self, size: int) -> Any:
        """Declare the lists, and the values that are left."""
        self.live = B.arg("channels", B.Buffer((self.live_features,), "int32"))
        self.before = B.arg("before", B.Buffer((self.geometry.m + MOST_LANES,), "int32"))
        return super().declare_weight(size)

    def tap(self, image: Any, channel: Any, y: Any, x: int) -> Activations:
        """Tell where a live feature of the tokens lies."""
        return Activations(self.x, self.live[channel], 0, self.geometry.k)

    def drain_panels(self, image: Any, sums: Any, shape: ChannelShape) -> None:
        """Spread the sums of each token over its features, and store them."""
        m, lanes = self.geometry.m, self.vectors.lanes
        left = m % lanes
        with thread_loop(self.tokens, shape.threads) as token:
            at = token * (shape.panels * shape.width)
            with B.serial(0, m // lanes) as vector:
                self._store_spread(sums, at, token, vector * lanes, None)
            if left:
                self._store_spread(sums, at, token, m - left, left)

    def _store_spread(self, sums: Any, at: Any, token: Any, feature: Any, left: Any) -> None:
        v = self.vectors
        is_live = v.load(self.before, feature + 1) > v.load(self.before, feature)
        acc = v.keep(T.Select(is_live, self._spread(sums, at, feature), v.zero()))
        store_features(self, acc, token * self.geometry.m + feature, feature, left)

    def _spread(self, sums: Any, at: Any, feature: Any) -> Any:
        """Bring to every lane the sum of as many live features as come before its own."""
        v, before = self.vectors, self.before
        if v.lanes not in PERMUTES:
            lanes = list(range(v.lanes))
            return tirx.Shuffle([sums[at + before[feature + i]] for i in lanes], lanes)
        first = before[feature]
        places = v.load(before, feature) - v.splat(first)
        held = v.load(sums, at + first)
        return T.call_llvm_intrin(f"float32x{v.lanes}", PERMUTES[v.lanes], held, places)


class CompactConv(ChannelConv):
    """NCHW around live channels: whole runs of pixels are read and stored by their lists."""

    def __init__(
        self,
        live: int,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        lanes: int,
        mr: int,
        kb: int,
    ) -> None:
        super().__init__(geometry, epilogue, lanes, mr, kb)
        self.geometry = replace(self.geometry, in_channels=live)
        self.padded = PaddedImage(self.geometry, lanes)

    def declare_weight(self, size: int) -> Any:
        """Declare the lists, and the values that are left."""
        self.live = B.arg("channels", B.Buffer((self.geometry.in_channels,), "int32"))
        self.rows = B.arg("rows", B.Buffer((self.whole.out_channels,), "int32"))
        return super().declare_weight(size)

    def plane(self, image: Any, channel: Any) -> Any:
        """Tell which plane of x holds a live channel of an image."""
        return image * self.whole.in_channels + self.live[channel]

    def row_of(self, slot: Any) -> Any:
        """Tell which output channel a row of the weight is."""
        return self.rows[slot]

    def drain(self, image: Any, sums: Any, shape: ChannelShape, panel: Any) -> None:
        """Store a panel, and a panel's share of the rows that have no weight."""
        super().drain(image, sums, shape, panel)
        empty = self.whole.out_channels - shape.rows
        if not empty:
            return
        v, share = self.vectors, math.ceil(empty / shape.panels)
        zero = v.register()
        v.store(zero, v.zero())
        count = T.max(0, T.min(share, empty - panel * share))
        squares = math.ceil(self.geometry.pixels / v.lanes)
        with B.serial(0, count) as i, B.serial(0, squares) as square:
            row = self.rows[shape.rows + panel * share + i]
            self.store_run(v.lanes, row, image, square * v.lanes, [zero], None)
