"""Matmul around the panel kernel: tokens are transposed into panels, results out of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Epilogue, MatmulGeometry
from ..epilogue import emit_epilogue
from ..vectors import Vectors
from .packed_panel import PackedPanel
from .register_tile import RegisterTile
from .squares import feature_columns, token_rows


class MatmulIO:
    """X [n][k] in, Y [n][m] out, both row-major; a panel holds tokens side by side."""

    def __init__(
        self, geometry: MatmulGeometry, epilogue: Epilogue, lanes: int, mr: int, kb: int
    ) -> None:
        self.geometry, self.epilogue = geometry, epilogue
        self.vectors, self.mr, self.kb = Vectors(lanes), mr, kb
        self.tokens = tirx.Var("n", "int64") if geometry.n is None else geometry.n

    def declare_input(self) -> None:
        """Declare x."""
        self.x = argument("x", (self.tokens, self.geometry.k))

    def declare_output(self) -> None:
        """Declare the epilogue's vectors [m] and tensors [n][m], and y."""
        m, count = self.geometry.m, self.epilogue
        self.channels = [
            B.arg(f"channel{i}", B.Buffer((m,), "float32")) for i in range(count.channels)
        ]
        self.tensors = [argument(f"tensor{i}", (self.tokens, m)) for i in range(count.tensors)]
        self.y = argument("y", (self.tokens, m))

    def open_views(self) -> None:
        """Alias x, the tensors and y as flat buffers."""
        self.x, self.y = flat(self.x), flat(self.y)
        self.tensors = [flat(tensor) for tensor in self.tensors]

    def with_lanes(self, lanes: int) -> MatmulIO:
        """Return the same on vectors of another width."""
        other = copy.copy(self)
        other.vectors = Vectors(lanes)
        return other

    def columns(self) -> Any:
        """Count the tokens."""
        return self.tokens

    def images(self) -> Any:
        """Run the product once."""
        return 1

    def group(self, image: Any) -> Any:
        """One weight."""
        return 0

    def prepare(self, image: Any, thread: Any, shares: Sequence[tuple[int, int]]) -> None:
        """Nothing to prepare."""

    def begin_unit(self, row_range: tuple[Any, Any], first: Any, nt: int) -> None:
        """Reserve the results of the unit, features-major."""
        v = self.vectors
        rows = -(-(row_range[1] - row_range[0]) // v.lanes) * v.lanes + self.mr
        self.result = B.alloc_buffer((rows * nt * v.lanes,), "float32", scope="global")
        self.first_row = row_range[0]
        self.panel = PackedPanel(v, self.kb, nt)

    def block_of(self, image: Any, first: Any, nt: int, block: Any) -> tuple[Any, Any]:
        """Transpose the block into a panel."""
        self._pack(self.panel.buffer, first, nt, block)
        self.panel.close()
        return self.panel.buffer, 0

    def _pack(self, panel: Any, first: Any, nt: int, block: Any) -> None:
        """Transpose squares of lanes x lanes into the panel; zeros behind the last feature."""
        v, k = self.vectors, self.geometry.k
        whole, rest = divmod(min(self.kb, k), v.lanes)
        if k <= self.kb:
            self._pack_squares(panel, first, nt, block, whole)
            if rest:
                self._pack_rest(panel, first, nt, block, whole, rest)
            return
        last = (k - 1) // self.kb
        whole_last, rest_last = divmod(k - last * self.kb, v.lanes)
        self._pack_squares(
            panel, first, nt, block, T.if_then_else(block == last, whole_last, whole)
        )
        if rest_last:
            with B.If(block == last), B.Then():
                self._pack_rest(panel, first, nt, block, whole_last, rest_last)

    def _pack_rest(
        self, panel: Any, first: Any, nt: int, block: Any, square: int, rest: int
    ) -> None:
        with B.serial(0, nt) as j:
            self._pack_square(panel, first, nt, block, square, rest, j)

    def _pack_squares(self, panel: Any, first: Any, nt: int, block: Any, count: Any) -> None:
        with B.serial(0, nt) as j, B.serial(0, count) as square:
            self._pack_square(panel, first, nt, block, square, None, j)

    def _pack_square(
        self, panel: Any, first: Any, nt: int, block: Any, square: Any, rest: int | None, j: Any
    ) -> None:
        v, k = self.vectors, self.geometry.k

        def base_of(i: int) -> Any:
            token = T.min(first + j * v.lanes + i, self.tokens - 1)
            return token * k + block * self.kb + square * v.lanes

        for i, column in enumerate(feature_columns(v, self.x, base_of, rest)):
            v.store(panel, column, ((square * v.lanes + i) * nt + j) * v.lanes)

    def sums(self, rows: int, width: int, first: Any) -> tuple[Any, Any]:
        """Sum up where the results will be."""
        return self.result, 0

    def store_rows(self, tile: RegisterTile, rows: Sequence[Any], image: Any, first: Any) -> None:
        """Keep the tile features-major until the unit ends."""
        tile.write(self.result, lambda r: (rows[r] - self.first_row) * tile.width)

    def end_unit(self, image: Any, first: Any, nt: int, row_range: tuple[Any, Any]) -> None:
        """Transpose the results, apply the epilogue, and store whole runs of features."""
        v = self.vectors
        whole, rest = divmod(row_range[1] - row_range[0], v.lanes)
        with B.serial(0, nt) as j:
            if whole:
                with B.serial(0, whole) as square:
                    self._store_square(first, nt, j, square, row_range[0], None)
            if rest:
                self._store_square(first, nt, j, whole, row_range[0], rest)

    def _store_square(
        self, first: Any, nt: int, j: Any, square: Any, low: Any, rest: int | None
    ) -> None:
        v, m = self.vectors, self.geometry.m
        rows = [
            v.keep(v.load(self.result, ((square * v.lanes + i) * nt + j) * v.lanes))
            for i in range(v.lanes)
        ]
        feature = low + square * v.lanes
        token = first + j * v.lanes
        with token_rows(v, rows, self.tokens - token) as (i, row):
            store_features(self, row, (token + i) * m + feature, feature, rest)


class FeatureRows(Protocol):
    """What results go through and to: an epilogue, its operands and y, as flat buffers."""

    vectors: Vectors
    epilogue: Epilogue
    channels: list[Any]
    tensors: list[Any]
    y: Any


def store_features(rows: FeatureRows, acc: Any, base: Any, feature: Any, left: Any) -> None:
    """Send a vector of a token's features through the epilogue to `base`.

    Only the first `left` of them exist; all do where it is None.
    """
    v = rows.vectors

    def load(buffer: Any, at: Any) -> Any:
        return v.keep(v.load(buffer, at) if left is None else v.load_masked(buffer, at, left))

    result = emit_epilogue(
        rows.epilogue,
        acc,
        lambda index: load(rows.channels[index], feature),
        lambda index: load(rows.tensors[index], base),
        v.lanes,
    )
    if left is None:
        v.store(rows.y, result, base)
    else:
        v.store_masked(rows.y, result, base, left)


def argument(name: str, shape: Sequence[Any]) -> Any:
    """Declare a float32 argument."""
    return B.arg(name, B.Buffer(tuple(shape), "float32"))


def flat(buffer: Any) -> Any:
    """Alias a buffer of several dimensions as a flat one."""
    length: Any = 1
    for extent in buffer.ty.shape if hasattr(buffer.ty, "shape") else buffer.shape:
        length = length * extent
    return B.decl_buffer((length,), "float32", data=buffer.data)
