"""How the rows of a finished register tile are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script import builder as B

from .register_tile import RegisterTile


def each_row(
    tile: RegisterTile,
    rows: Sequence[Any],
    count: int,
    store_row: Callable[[Any, Sequence[Any]], None],
) -> None:
    """Call `store_row`(row, its registers) for every row of a tile that the matrix has.

    `rows` are the matrix rows of the tile's slots; those behind the last row are `count` or more.
    """
    for r, row in enumerate(rows):
        if count % tile.mr:
            with B.If(row < count), B.Then():
                store_row(row, tile.acc[r])
        else:
            store_row(row, tile.acc[r])
