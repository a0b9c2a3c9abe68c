"""Matmul between layers that keep their activations in panels: nothing is transposed.

`tvm_sparse.panels` describes the layout. The row of zeros behind the last feature is what padding
in a weight names. Tokens behind the last are computed like any other and mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as B

from ...panels import Panels
from ...workload import Epilogue, MatmulGeometry
from ..epilogue import emit_epilogue, is_long
from ..vectors import Vectors
from .matmul_io import argument
from .packed_panel import write_zeros
from .register_tile import RegisterTile
from .tile_store import each_row


class PanelsIO:
    """Flat panels of k features in, of m features out."""

    def __init__(
        self, geometry: MatmulGeometry, epilogue: Epilogue, panels: Panels, mr: int, kb: int
    ) -> None:
        self.geometry, self.epilogue, self.panels = geometry, epilogue, panels
        self.vectors, self.kb = Vectors(panels.lanes), kb
        self.every_slot_is_a_row = geometry.m % mr == 0
        # A long epilogue is applied when the unit ends, in a loop that nothing interrupts: behind
        # each tile, whose loops end unforeseen, its latency would show.
        self.at_the_end = is_long(epilogue)

    def declare_input(self) -> None:
        """Declare x."""
        self.x = argument("x", (self.panels.size(self.geometry.k),))

    def declare_output(self) -> None:
        """Declare the epilogue's vectors [m] and tensors (the shape of y), and y."""
        m, count = self.geometry.m, self.epilogue
        self.channels = [
            B.arg(f"channel{i}", B.Buffer((m,), "float32")) for i in range(count.channels)
        ]
        shape = (self.panels.size(m),)
        self.tensors = [argument(f"tensor{i}", shape) for i in range(count.tensors)]
        self.y = argument("y", shape)

    def open_views(self) -> None:
        """All tensors are flat."""

    def columns(self) -> Any:
        """Count the tokens."""
        return self.panels.tokens

    def images(self) -> Any:
        """Run the product once."""
        return 1

    def group(self, image: Any) -> Any:
        """One weight."""
        return 0

    def prepare(self, image: Any, thread: Any, shares: Sequence[tuple[int, int]]) -> None:
        """Nothing to prepare."""

    def begin_unit(self, row_range: tuple[Any, Any], first: Any, nt: int) -> None:
        """Remember where the unit's rows begin."""
        self.first_row = row_range[0]

    def block_of(self, image: Any, first: Any, nt: int, block: Any) -> tuple[Any, Any]:
        """Point into x: the block lies as the kernel wants it."""
        width = nt * self.vectors.lanes
        return self.x, first * (self.geometry.k + 1) + block * (self.kb * width)

    def sums(self, rows: int, width: int, first: Any) -> tuple[Any, Any]:
        """Sum up in y, or in a buffer with room for slots behind the last row."""
        if self.every_slot_is_a_row:
            return self.y, first * (self.geometry.m + 1) + self.first_row * width
        return B.alloc_buffer((rows * width,), "float32", scope="global"), 0

    def store_rows(self, tile: RegisterTile, rows: Sequence[Any], image: Any, first: Any) -> None:
        """Store every row that exists, and apply the epilogue if it is short."""
        v = self.vectors

        def store_row(row: Any, registers: Sequence[Any]) -> None:
            base = first * (self.geometry.m + 1) + row * tile.width
            for j, register in enumerate(registers):
                if self.at_the_end:
                    v.store(self.y, v.load(register), base + j * v.lanes)
                else:
                    self._store_vector(v.load(register), row, base + j * v.lanes)

        each_row(tile, rows, self.geometry.m, store_row)

    def _store_vector(self, acc: Any, row: Any, at: Any) -> None:
        v = self.vectors
        result = emit_epilogue(
            self.epilogue,
            acc,
            lambda index: v.keep(v.splat(self.channels[index][row])),
            lambda index: v.keep(v.load(self.tensors[index], at)),
            v.lanes,
        )
        v.store(self.y, result, at)

    def end_unit(self, image: Any, first: Any, nt: int, row_range: tuple[Any, Any]) -> None:
        """Apply a long epilogue, and write the zeros behind the last feature."""
        v, m = self.vectors, self.geometry.m
        if self.at_the_end:
            with B.serial(row_range[0], row_range[1]) as row:
                for j in range(nt):
                    at = first * (m + 1) + (row * nt + j) * v.lanes
                    self._store_vector(v.keep(v.load(self.y, at)), row, at)
        if row_range[1] == m:
            write_zeros(v, self.y, first * (m + 1) + m * nt * v.lanes, nt)
