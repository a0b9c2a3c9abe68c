"""How the panel kernels read a weight: the inner loops of the register tile, format by format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from .packed_words import Fields, Position, Spread, rolled_loop
from .register_tile import RegisterTile


def _declare_nonzeros() -> dict[str, Any]:
    """Declare the long arrays; they keep symbolic lengths, so that layers share the function.

    ``one`` is a 1 that the compiler does not know, see `rolled_loop`.
    """
    columns, values = tirx.Var("n_columns", "int64"), tirx.Var("n_values", "int64")
    return {
        "columns": B.arg("columns", B.Buffer((columns,), "uint16")),
        "values": B.arg("values", B.Buffer((values,), "float32")),
        "one": T.Cast("int32", T.min(columns, T.int64(1))),
    }


@dataclass(frozen=True)
class MaskedWeight:
    """The arrays of a `register_tiled` weight as kernel arguments."""

    mr: int
    panels: int
    blocks: int

    def declare(self) -> dict[str, Any]:
        """Declare the arguments."""
        groups = self.panels * self.blocks
        return {
            "counts": B.arg("counts", B.Buffer((groups << self.mr,), "uint16")),
            "column_at": B.arg("column_at", B.Buffer((groups,), "int32")),
            "value_at": B.arg("value_at", B.Buffer((groups,), "int32")),
            "rows": B.arg("rows", B.Buffer((self.panels * self.mr,), "int32")),
            **_declare_nonzeros(),
        }

    def row(self, args: dict[str, Any], block: Any, panel: Any, slot: int) -> Any:
        """Return the matrix row of a panel slot."""
        return args["rows"][panel * self.mr + slot]

    def accumulate(
        self,
        args: dict[str, Any],
        tile: RegisterTile,
        group: Any,
        block: Any,
        panel: Any,
        x: Any,
        offset: Any,
    ) -> None:
        """Add a panel to the tile; `x` holds the block as [kb][width] from `offset` on."""
        at = block * self.panels + panel
        column, value = Position(args["column_at"][at]), Position(args["value_at"][at])
        for mask in range(1, 1 << self.mr):
            rows = [r for r in range(self.mr) if mask >> r & 1]
            with rolled_loop(args["counts"][at * (1 << self.mr) + mask], args["one"]):
                base = offset + T.Cast("int32", args["columns"][column.now]) * tile.width
                tile.multiply(
                    rows, lambda q: tile.vectors.splat(args["values"][value.now + q]), x, base
                )
                column.advance(1)
                value.advance(len(rows))


def _value_of(values: Spread, rows: Sequence[int], index: int) -> Any:
    return values.of(rows[index])


@dataclass(frozen=True)
class SlicedWeight:
    """The arrays of a `sliced_ell` weight as kernel arguments.

    `share` rows of a slice read a column together in the slice's first loop, none in its last.
    """

    mr: int
    panels: int
    blocks: int
    share: int

    def declare(self) -> dict[str, Any]:
        """Declare the arguments."""
        pieces = self.panels * self.blocks
        return {
            "lengths": B.arg("lengths", B.Buffer((pieces * len(self._groups),), "uint16")),
            "column_at": B.arg("column_at", B.Buffer((pieces,), "int32")),
            "value_at": B.arg("value_at", B.Buffer((pieces,), "int32")),
            "rows": B.arg("rows", B.Buffer((pieces * self.mr,), "int32")),
            **_declare_nonzeros(),
        }

    @property
    def _groups(self) -> tuple[int, ...]:
        """Rows that share a column, loop by loop."""
        return (1,) if self.share == 1 else (self.share, 1)

    def row(self, args: dict[str, Any], block: Any, panel: Any, slot: int) -> Any:
        """Return the matrix row of a slot: another one in every block."""
        return args["rows"][(block * self.panels + panel) * self.mr + slot]

    def accumulate(
        self,
        args: dict[str, Any],
        tile: RegisterTile,
        group: Any,
        block: Any,
        panel: Any,
        x: Any,
        offset: Any,
    ) -> None:
        """Add a slice to the tile; `x` holds the block as [kb][width] from `offset` on.

        A step of a loop takes one nonzero of every row. Its values are read as one vector and
        spread in registers: a broadcast from memory would take the place of a load of `x`.
        """
        piece = block * self.panels + panel
        column, value = Position(args["column_at"][piece]), Position(args["value_at"][piece])
        for loop, together in enumerate(self._groups):
            length = args["lengths"][piece * len(self._groups) + loop]
            with rolled_loop(length, args["one"]):
                values = Spread(tile.vectors, args["values"], value.now, self.mr)
                columns = Fields(args["columns"], column.now, self.mr // together)
                for index, first in enumerate(range(0, self.mr, together)):
                    base = offset + columns.of(index) * tile.width
                    rows = list(range(first, first + together))
                    tile.multiply(rows, partial(_value_of, values, rows), x, base)
                column.advance(self.mr // together)
                value.advance(self.mr)


@dataclass(frozen=True)
class GatheredWeight:
    """The arrays of a `gathered_panels` weight as kernel arguments."""

    mr: int
    panels: int
    blocks: int

    def declare(self) -> dict[str, Any]:
        """Declare the arguments."""
        pieces = self.panels * self.blocks
        return {
            "lengths": B.arg("lengths", B.Buffer((pieces,), "uint16")),
            "column_at": B.arg("column_at", B.Buffer((pieces,), "int32")),
            "rows": B.arg("rows", B.Buffer((self.panels * self.mr,), "int32")),
            **_declare_nonzeros(),
        }

    def row(self, args: dict[str, Any], block: Any, panel: Any, slot: int) -> Any:
        """Return the matrix row of a panel slot."""
        return args["rows"][panel * self.mr + slot]

    def accumulate(
        self,
        args: dict[str, Any],
        tile: RegisterTile,
        group: Any,
        block: Any,
        panel: Any,
        x: Any,
        offset: Any,
    ) -> None:
        """Add a panel to the tile; `x` holds the block as [kb][width] from `offset` on."""
        at = block * self.panels + panel
        column = Position(args["column_at"][at])
        with rolled_loop(args["lengths"][at], args["one"]):
            base = offset + T.Cast("int32", args["columns"][column.now]) * tile.width
            first = column.now * self.mr
            tile.multiply(
                list(range(self.mr)),
                lambda q: tile.vectors.splat(args["values"][first + q]),
                x,
                base,
            )
            column.advance(1)


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
        self,
        args: dict[str, Any],
        tile: RegisterTile,
        group: Any,
        block: Any,
        panel: Any,
        x: Any,
        offset: Any,
    ) -> None:
        """Add a panel to the tile; `x` holds the block as [kb][width] from `offset` on."""
        length = (
            T.min(T.int32(self.kb), self.columns - block * self.kb)
            if self.columns % self.kb
            else self.kb
        )
        with B.serial(0, length) as k:
            base = ((group * self.panels + panel) * self.columns + block * self.kb + k) * self.mr
            tile.multiply(
                list(range(self.mr)),
                lambda q: tile.vectors.splat(args["values"][base + q]),
                x,
                offset + k * tile.width,
            )
