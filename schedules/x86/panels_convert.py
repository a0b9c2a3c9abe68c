"""Bring activations [tokens][features] into panels, and back (`tvm_sparse.panels`)."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...panels import Panels
from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import dense_kernel, outer_loop
from .panel_kernel import emit_tile

_NANOSECONDS_PER_VECTOR = 2.0


def pack_panels(panels: Panels, features: int, machine: X86Machine) -> tirx.PrimFunc:
    """Build the transposition into panels.

    Parameters
    ----------
    panels : Panels
        How the tokens are cut. Tokens behind the last repeat it.
    features : int
        Of one token.
    machine : X86Machine
        Gives threads.

    Returns
    -------
    PrimFunc
        Parameters (x [tokens, features], y, flat), float32.
    """
    return _conversion("pack_panels", panels, features, machine)


def unpack_panels(panels: Panels, features: int, machine: X86Machine) -> tirx.PrimFunc:
    """Build the transposition out of panels.

    Returns
    -------
    PrimFunc
        Parameters (x, flat, y [tokens, features]), float32.
    """
    return _conversion("unpack_panels", panels, features, machine)


def _conversion(name: str, panels: Panels, features: int, machine: X86Machine) -> tirx.PrimFunc:
    packs = name == "pack_panels"
    shapes = ([panels.tokens, features], [panels.size(features)])
    result: list[Any] = []
    with dense_kernel(name, result) as kernel:
        x = kernel.tensor("x", shapes[0 if packs else 1])
        y = kernel.tensor("y", shapes[1 if packs else 0])
        squares = _Squares(panels, features, *((x, y) if packs else (y, x)))
        cost = panels.columns * features / panels.lanes * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body(), outer_loop(panels.tiles.total, cost, machine.threads) as index:
            emit = squares.pack if packs else squares.unpack
            emit_tile(panels.tiles, panels.lanes, index, emit)
    return result[0]


class _Squares:
    """Walks over a panel in squares of lanes x lanes elements."""

    def __init__(self, panels: Panels, features: int, rows: Any, flat: Any) -> None:
        self.panels, self.features = panels, features
        self.rows, self.flat = rows, flat
        self.vectors = Vectors(panels.lanes)

    def pack(self, first: Any, nt: int) -> None:
        """Transpose a panel in, and write the zeros behind it."""
        v, base = self.vectors, first * (self.features + 1)
        whole, rest = divmod(self.features, v.lanes)
        with B.serial(0, nt) as j:
            with B.serial(0, whole) as square:
                self._pack_square(first, nt, j, square, v.lanes)
            if rest:
                self._pack_square(first, nt, j, whole, rest)
            v.store(self.flat.flat, v.zero(), base + (self.features * nt + j) * v.lanes)

    def _pack_square(self, first: Any, nt: int, j: Any, square: Any, count: int) -> None:
        v = self.vectors

        def row(i: int) -> Any:
            token = T.min(first + j * v.lanes + i, self.panels.tokens - 1)
            at = token * self.features + square * v.lanes
            if count == v.lanes:
                return v.keep(v.load(self.rows.flat, at))
            return v.keep(v.load_masked(self.rows.flat, at, count))

        columns = v.transpose([row(i) for i in range(v.lanes)])
        base = first * (self.features + 1)
        for i, column in enumerate(columns[:count]):
            v.store(self.flat.flat, column, base + ((square * v.lanes + i) * nt + j) * v.lanes)

    def unpack(self, first: Any, nt: int) -> None:
        """Transpose a panel out."""
        whole, rest = divmod(self.features, self.vectors.lanes)
        with B.serial(0, nt) as j:
            with B.serial(0, whole) as square:
                self._unpack_square(first, nt, j, square, self.vectors.lanes)
            if rest:
                self._unpack_square(first, nt, j, whole, rest)

    def _unpack_square(self, first: Any, nt: int, j: Any, square: Any, count: int) -> None:
        v = self.vectors
        base = first * (self.features + 1)
        columns = [
            v.keep(
                v.load(self.flat.flat, base + ((square * v.lanes + i) * nt + j) * v.lanes)
                if i < count
                else v.zero()
            )
            for i in range(v.lanes)
        ]
        scratch = B.alloc_buffer((v.lanes * v.lanes,), "float32", scope="global")
        for i, row in enumerate(v.transpose(columns)):
            v.store(scratch, row, i * v.lanes)
        token = first + j * v.lanes
        with B.serial(0, T.min(T.Cast("int32", self.panels.tokens - token), v.lanes)) as i:
            at = (token + i) * self.features + square * v.lanes
            row = v.keep(v.load(scratch, i * v.lanes))
            if count == v.lanes:
                v.store(self.rows.flat, row, at)
            else:
                v.store_masked(self.rows.flat, row, at, count)
