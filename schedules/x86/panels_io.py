"""Matmul between layers that keep their activations in panels: nothing is transposed.

A panel holds `nt` vectors of tokens side by side, feature by feature: X [panels][k + 1][width] in,
Y [panels][m][width] out. The row behind the last feature holds zeros, which padding in a weight
names. Tokens behind the last are computed like any other and mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as B

from ...workload import Epilogue, MatmulGeometry
from ..epilogue import emit_epilogue
from ..vectors import Vectors
from .matmul_io import argument, flat
from .panel_kernel import PanelShape
from .register_tile import RegisterTile


class PanelsIO:
    """X [panels][k + 1][width] in, Y [panels][m][width] out."""

    def __init__(
        self, geometry: MatmulGeometry, epilogue: Epilogue, lanes: int, shape: PanelShape
    ) -> None:
        assert geometry.n is not None
        self.geometry, self.epilogue = geometry, epilogue
        self.vectors, self.kb, self.width = Vectors(lanes), shape.kb, shape.nt * lanes
        self.every_slot_is_a_row = geometry.m % shape.mr == 0
        self.panels = -(-geometry.n // self.width)

    def declare_input(self) -> None:
        """Declare x."""
        self.x = argument("x", (self.panels, self.geometry.k + 1, self.width))

    def declare_output(self) -> None:
        """Declare the epilogue's vectors [m] and tensors (the shape of y), and y."""
        m, count = self.geometry.m, self.epilogue
        self.channels = [
            B.arg(f"channel{i}", B.Buffer((m,), "float32")) for i in range(count.channels)
        ]
        shape = (self.panels, m, self.width)
        self.tensors = [argument(f"tensor{i}", shape) for i in range(count.tensors)]
        self.y = argument("y", shape)

    def open_views(self) -> None:
        """Alias x, the tensors and y as flat buffers."""
        self.x, self.y = flat(self.x), flat(self.y)
        self.tensors = [flat(tensor) for tensor in self.tensors]

    def columns(self) -> Any:
        """Count the tokens, those behind the last included."""
        return self.panels * self.width

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
        return self.x, first * (self.geometry.k + 1) + block * (self.kb * self.width)

    def sums(self, size: int, first: Any) -> tuple[Any, Any]:
        """Sum up in y, or in a buffer with room for slots behind the last row."""
        if self.every_slot_is_a_row:
            return self.y, first * self.geometry.m + self.first_row * self.width
        return B.alloc_buffer((size,), "float32", scope="global"), 0

    def store_rows(self, tile: RegisterTile, rows: Sequence[Any], image: Any, first: Any) -> None:
        """Apply the epilogue and store every row that exists."""
        for r, row in enumerate(rows):
            if not self.every_slot_is_a_row:
                with B.If(row < self.geometry.m), B.Then():
                    self._store_row(tile.acc[r], row, first)
            else:
                self._store_row(tile.acc[r], row, first)

    def _store_row(self, registers: Sequence[Any], row: Any, first: Any) -> None:
        base = first * self.geometry.m + row * self.width
        for j, register in enumerate(registers):
            self._store_vector(register, row, base + j * self.vectors.lanes)

    def _store_vector(self, register: Any, row: Any, at: Any) -> None:
        v = self.vectors
        result = emit_epilogue(
            self.epilogue,
            v.load(register),
            lambda index: v.keep(v.splat(self.channels[index][row])),
            lambda index: v.keep(v.load(self.tensors[index], at)),
            v.lanes,
        )
        v.store(self.y, result, at)

    def end_unit(self, image: Any, first: Any, nt: int, row_range: tuple[Any, Any]) -> None:
        """Everything was stored."""
