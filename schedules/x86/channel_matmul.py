"""Matmul around the channel kernel: a token is a pixel, its features are its channels."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..epilogue import emit_epilogue
from .channel_kernel import Activations, ChannelShape
from .matmul_io import MatmulIO


class ChannelMatmul(MatmulIO):
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
        base = token * m + feature
        left = T.Cast("int32", m - feature) if m % v.lanes else None
        # A panel may have whole vectors behind the last feature.
        with B.If(feature < m), B.Then():

            def load(buffer: Any, at: Any) -> Any:
                return v.keep(
                    v.load(buffer, at) if left is None else v.load_masked(buffer, at, left)
                )

            result = emit_epilogue(
                self.epilogue,
                v.keep(v.load(sums, at)),
                lambda index: load(self.channels[index], feature),
                lambda index: load(self.tensors[index], base),
                v.lanes,
            )
            if left is None:
                v.store(self.y, result, base)
            else:
                v.store_masked(self.y, result, base, left)
