"""Bring activations [tokens][features] into panels, and back (`tvm_sparse.panels`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...panels import Panels
from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import dense_kernel, outer_loop
from .packed_panel import write_zeros
from .panel_kernel import emit_tile
from .squares import feature_columns, token_rows

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
        v = self.vectors
        with B.serial(0, nt) as j:
            self._each_square(partial(self._pack_square, flat, first, nt, j))
        behind = first * (self.features + 1) + self.features * nt * v.lanes
        write_zeros(v, flat.flat, behind, nt)

    def unpack(self, flat: Any, first: Any, nt: int) -> None:
        """Transpose a panel out."""
        with B.serial(0, nt) as j:
            self._each_square(partial(self._unpack_square, flat, first, nt, j))

    def _each_square(self, visit: Callable[[Any, int | None], None]) -> None:
        """Call `visit`(number, features if fewer than lanes) for the squares of a column."""
        whole, rest = divmod(self.features, self.vectors.lanes)
        with B.serial(0, whole) as square:
            visit(square, None)
        if rest:
            visit(whole, rest)

    def _vector_at(self, first: Any, nt: int, j: Any, feature: Any) -> Any:
        """Tell where a feature of a panel's j-th vector of tokens lies."""
        return first * (self.features + 1) + (feature * nt + j) * self.vectors.lanes

    def _pack_square(
        self, flat: Any, first: Any, nt: int, j: Any, square: Any, rest: int | None
    ) -> None:
        v = self.vectors

        def base_of(i: int) -> Any:
            token = T.min(first + j * v.lanes + i, self.panels.tokens - 1)
            return (self.first_token + token) * self.features + square * v.lanes

        columns = feature_columns(v, self.rows.flat, base_of, rest)
        for i, column in enumerate(columns[:rest]):
            v.store(flat.flat, column, self._vector_at(first, nt, j, square * v.lanes + i))

    def _unpack_square(
        self, flat: Any, first: Any, nt: int, j: Any, square: Any, rest: int | None
    ) -> None:
        v = self.vectors

        def column(i: int) -> Any:
            if rest is not None and i >= rest:
                return v.zero()
            return v.load(flat.flat, self._vector_at(first, nt, j, square * v.lanes + i))

        columns = [v.keep(column(i)) for i in range(v.lanes)]
        token = first + j * v.lanes
        with token_rows(v, columns, self.panels.tokens - token) as (i, row):
            at = (self.first_token + token + i) * self.features + square * v.lanes
            if rest is None:
                v.store(self.rows.flat, row, at)
            else:
                v.store_masked(self.rows.flat, row, at, rest)
