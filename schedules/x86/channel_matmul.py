"""Matmul around the channel kernel: a token is a pixel, its features are its channels."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from .channel_kernel import Activations, ChannelShape, PanelByPanel
from .matmul_io import MatmulIO, store_features


class ChannelMatmul(PanelByPanel, MatmulIO):
    """X [n][k] in, Y [n][m] out, both row-major: results lie as they are stored."""

    def prepare_whole(self, image: Any) -> None:
        """Nothing to prepare."""

    def tap(self, image: Any, channel: Any, y: Any, x: int) -> Activations:
        """Tell where a feature of the tokens lies."""
        return Activations(self.x, channel, 0, self.geometry.k)

    def drain(self, image: Any, sums: Any, shape: ChannelShape, panel: Any) -> None:
        """Apply the epilogue, and store the features of one token after the other."""
        with B.serial(0, self.tokens) as token, B.serial(0, shape.vectors) as vector:
            feature = panel * shape.width + vector * shape.lanes
            self._store(sums, token, token * shape.width + vector * shape.lanes, feature)

    def _store(self, sums: Any, token: Any, at: Any, feature: Any) -> None:
        v, m = self.vectors, self.geometry.m
        left = T.Cast("int32", m - feature) if m % v.lanes else None
        # A panel may have whole vectors behind the last feature.
        with B.If(feature < m), B.Then():
            acc = v.keep(v.load(sums, at))
            store_features(self, acc, token * m + feature, feature, left)
