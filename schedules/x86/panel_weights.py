"""How the panel kernels read a weight: the inner loops of the register tile, dense and masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..vectors import Vectors


class RegisterTile:
    """`mr` x `nt` accumulators of one vector each."""

    def __init__(self, vectors: Vectors, mr: int, nt: int) -> None:
        self.vectors, self.mr, self.nt = vectors, mr, nt
        self.width = nt * vectors.lanes
        self.acc = [[vectors.register() for _ in range(nt)] for _ in range(mr)]
        self.shared = [vectors.register() for _ in range(nt)]

    def clear(self) -> None:
        """Set every accumulator to zero."""
        for row in self.acc:
            for register in row:
                self.vectors.store(register, self.vectors.zero())

    def read(self, buffer: Any, base_of: Callable[[int], Any]) -> None:
        """Load row r of the tile from `buffer` at `base_of(r)`."""
        for r, row in enumerate(self.acc):
            for j, register in enumerate(row):
                offset = base_of(r) + j * self.vectors.lanes
                self.vectors.store(register, self.vectors.load(buffer, offset))

    def write(self, buffer: Any, base_of: Callable[[int], Any]) -> None:
        """Store row r of the tile to `buffer` at `base_of(r)`."""
        for r, row in enumerate(self.acc):
            for j, register in enumerate(row):
                value = self.vectors.load(register)
                self.vectors.store(buffer, value, base_of(r) + j * self.vectors.lanes)

    def multiply(self, rows: list[int], weight_of: Callable[[int], Any], x: Any, base: Any) -> None:
        """Add weight_of(q) * x[base:] to each accumulator row in `rows`; x is loaded once."""
        v, lanes = self.vectors, self.vectors.lanes
        if len(rows) > 1:
            for j, register in enumerate(self.shared):
                v.store(register, v.load(x, base + j * lanes))
        for q, r in enumerate(rows):
            for j, register in enumerate(self.acc[r]):
                operand = v.load(self.shared[j]) if len(rows) > 1 else v.load(x, base + j * lanes)
                v.store(register, v.load(register) + v.splat(weight_of(q)) * operand)


@dataclass(frozen=True)
class MaskedWeight:
    """The arrays of a `register_tiled` weight as kernel arguments."""

    mr: int
    panels: int
    blocks: int

    def declare(self) -> dict[str, Any]:
        """Declare the arguments; long arrays keep symbolic lengths: layers share the function."""
        groups = self.panels * self.blocks
        columns, values = tirx.Var("n_columns", "int64"), tirx.Var("n_values", "int64")
        return {
            "counts": B.arg("counts", B.Buffer((groups << self.mr,), "uint16")),
            "column_at": B.arg("column_at", B.Buffer((groups,), "int32")),
            "value_at": B.arg("value_at", B.Buffer((groups,), "int32")),
            "rows": B.arg("rows", B.Buffer((self.panels * self.mr,), "int32")),
            "columns": B.arg("columns", B.Buffer((columns,), "uint16")),
            "values": B.arg("values", B.Buffer((values,), "float32")),
        }

    def row(self, args: dict[str, Any], block: Any, panel: Any, slot: int) -> Any:
        """Return the matrix row of a panel slot."""
        return args["rows"][panel * self.mr + slot]

    def accumulate(
        self, args: dict[str, Any], tile: RegisterTile, group: Any, block: Any, panel: Any, x: Any
    ) -> None:
        """Add the (block, panel) part of W X to the tile; `x` holds the block as [kb][width].

        Positions are counted up instead of computed from the loop variable: LLVM then leaves the
        short loops rolled.
        """
        at = block * self.panels + panel
        column_pos = B.alloc_buffer((1,), "int64", scope="global")
        value_pos = B.alloc_buffer((1,), "int64", scope="global")
        B.buffer_store(column_pos, T.Cast("int64", args["column_at"][at]), [0])
        B.buffer_store(value_pos, T.Cast("int64", args["value_at"][at]), [0])
        for mask in range(1, 1 << self.mr):
            rows = [r for r in range(self.mr) if mask >> r & 1]
            with B.serial(0, T.Cast("int32", args["counts"][at * (1 << self.mr) + mask])):
                base = T.Cast("int32", args["columns"][column_pos[0]]) * tile.width
                tile.multiply(rows, lambda q: args["values"][value_pos[0] + q], x, base)
                B.buffer_store(column_pos, column_pos[0] + 1, [0])
                B.buffer_store(value_pos, value_pos[0] + len(rows), [0])


def _constant(value: Any, _position: int) -> Any:
    return value


@dataclass(frozen=True)
class SlicedWeight:
    """The arrays of a `sliced_ell` weight as kernel arguments."""

    mr: int
    panels: int
    blocks: int

    def declare(self) -> dict[str, Any]:
        """Declare the arguments; long arrays keep symbolic lengths: layers share the function."""
        pieces = self.panels * self.blocks
        entries = tirx.Var("n_entries", "int64")
        return {
            "lengths": B.arg("lengths", B.Buffer((pieces,), "uint16")),
            "starts": B.arg("starts", B.Buffer((pieces,), "int32")),
            "rows": B.arg("rows", B.Buffer((pieces * self.mr,), "int32")),
            "columns": B.arg("columns", B.Buffer((entries,), "uint16")),
            "values": B.arg("values", B.Buffer((entries,), "float32")),
        }

    def row(self, args: dict[str, Any], block: Any, panel: Any, slot: int) -> Any:
        """Return the matrix row of a slot: another one in every block."""
        return args["rows"][(block * self.panels + panel) * self.mr + slot]

    def accumulate(
        self, args: dict[str, Any], tile: RegisterTile, group: Any, block: Any, panel: Any, x: Any
    ) -> None:
        """Add a slice to the tile; `x` holds the block as [kb][width], and a row of zeros."""
        piece = block * self.panels + panel
        start = T.Cast("int64", args["starts"][piece])
        with B.serial(T.int64(0), T.Cast("int64", args["lengths"][piece])) as entry:
            for r in range(self.mr):
                at = (start + entry) * self.mr + r
                base = T.Cast("int64", args["columns"][at]) * tile.width
                value = args["values"][at]
                tile.multiply([r], partial(_constant, value), x, base)


@dataclass(frozen=True)
class DenseWeight:
    """The array of a `dense` weight as a kernel argument; every column has every row."""

    mr: int
    panels: int
    columns: int
    kb: int
    groups: int = 1

    def declare(self) -> dict[str, Any]:
        """Declare the argument."""
        length = self.groups * self.panels * self.columns * self.mr
        return {"values": B.arg("values", B.Buffer((length,), "float32"))}

    def row(self, args: dict[str, Any], block: Any, panel: Any, slot: int) -> Any:
        """Return the matrix row of a panel slot."""
        return panel * self.mr + slot

    def accumulate(
        self, args: dict[str, Any], tile: RegisterTile, group: Any, block: Any, panel: Any, x: Any
    ) -> None:
        """Add the (block, panel) part of W X to the tile; `x` holds the block as [kb][width]."""
        length = (
            T.min(T.int32(self.kb), self.columns - block * self.kb)
            if self.columns % self.kb
            else self.kb
        )
        with B.serial(0, length) as k:
            base = ((group * self.panels + panel) * self.columns + block * self.kb + k) * self.mr
            tile.multiply(
                list(range(self.mr)), lambda q: args["values"][base + q], x, k * tile.width
            )
