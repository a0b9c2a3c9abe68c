"""Bring activations [tokens][features] into panels, and back (`tvm_sparse.panels`)."""

from __future__ import annotations

from functools import partial
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


def pack_panels(
    panels: Panels, features: int, machine: X86Machine, part: int = 0, parts: int = 1
) -> tirx.PrimFunc:
    """Build the transposition into panels.

    Parameters
    ----------
    panels : Panels
        How the tokens are cut. Tokens behind the last repeat it.
    features : int
        Of one token.
    machine : X86Machine
        Gives threads.
    part, parts : int
        Which of how many equal parts of the tokens; `panels` describes one.

    Returns
    -------
    PrimFunc
        Parameters (x [parts * tokens, features], y, flat), float32.
    """
    result: list[Any] = []
    with dense_kernel("pack_panels", result) as kernel:
        x = kernel.tensor("x", [parts * panels.tokens, features])
        y = kernel.tensor("y", [panels.size(features)])
        with kernel.body():
            squares = _Squares(panels, features, x, part * panels.tokens)
            with outer_loop(panels.tiles.total, _cost(panels, features), machine.threads) as index:
                emit_tile(panels.tiles, panels.lanes, index, partial(squares.pack, y))
    return result[0]


def unpack_panels(
    panels: Panels, features: int, machine: X86Machine, parts: int = 1
) -> tirx.PrimFunc:
    """Build the transposition out of panels.

    Returns
    -------
    PrimFunc
        Parameters (x of each part, flat, y [parts * tokens, features]), float32.
    """
    result: list[Any] = []
    with dense_kernel("unpack_panels", result) as kernel:
        flats = [kernel.tensor(f"x{part}", [panels.size(features)]) for part in range(parts)]
        y = kernel.tensor("y", [parts * panels.tokens, features])
        with kernel.body():
            for part, flat in enumerate(flats):
                squares = _Squares(panels, features, y, part * panels.tokens)
                with outer_loop(
                    panels.tiles.total, _cost(panels, features), machine.threads
                ) as index:
                    emit_tile(panels.tiles, panels.lanes, index, partial(squares.unpack, flat))
    return result[0]


def _cost(panels: Panels, features: int) -> float:
    return panels.columns * features / panels.lanes * _NANOSECONDS_PER_VECTOR / 1e3


class _Squares:
    """Walks over a panel in squares of lanes x lanes elements."""

    def __init__(self, panels: Panels, features: int, rows: Any, first_token: int) -> None:
        self.panels, self.features = panels, features
        self.rows, self.first_token = rows, first_token
        self.vectors = Vectors(panels.lanes)

    def pack(self, flat: Any, first: Any, nt: int) -> None:
        """Transpose a panel in, and write the zeros behind it."""
        v, base = self.vectors, first * (self.features + 1)
        whole, rest = divmod(self.features, v.lanes)
        with B.serial(0, nt) as j:
            with B.serial(0, whole) as square:
                self._pack_square(flat, first, nt, j, square, v.lanes)
            if rest:
                self._pack_square(flat, first, nt, j, whole, rest)
            v.store(flat.flat, v.zero(), base + (self.features * nt + j) * v.lanes)

    def _pack_square(self, flat: Any, first: Any, nt: int, j: Any, square: Any, count: int) -> None:
        v = self.vectors

        def row(i: int) -> Any:
            token = T.min(first + j * v.lanes + i, self.panels.tokens - 1)
            at = (self.first_token + token) * self.features + square * v.lanes
            if count == v.lanes:
                return v.keep(v.load(self.rows.flat, at))
            return v.keep(v.load_masked(self.rows.flat, at, count))

        columns = v.transpose([row(i) for i in range(v.lanes)])
        base = first * (self.features + 1)
        for i, column in enumerate(columns[:count]):
            v.store(flat.flat, column, base + ((square * v.lanes + i) * nt + j) * v.lanes)

    def unpack(self, flat: Any, first: Any, nt: int) -> None:
        """Transpose a panel out."""
        whole, rest = divmod(self.features, self.vectors.lanes)
        with B.serial(0, nt) as j:
            with B.serial(0, whole) as square:
                self._unpack_square(flat, first, nt, j, square, self.vectors.lanes)
            if rest:
                self._unpack_square(flat, first, nt, j, whole, rest)

    def _unpack_square(
        self, flat: Any, first: Any, nt: int, j: Any, square: Any, count: int
    ) -> None:
        v = self.vectors
        base = first * (self.features + 1)
        columns = [
            v.keep(
                v.load(flat.flat, base + ((square * v.lanes + i) * nt + j) * v.lanes)
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
            at = (self.first_token + token + i) * self.features + square * v.lanes
            row = v.keep(v.load(scratch, i * v.lanes))
            if count == v.lanes:
                v.store(self.rows.flat, row, at)
            else:
                v.store_masked(self.rows.flat, row, at, count)
