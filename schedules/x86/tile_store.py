"""How a finished register tile is stored where rows of results are runs of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.tirx.script import builder as B

from ...workload import Epilogue
from ..epilogue import is_long
from .register_tile import RegisterTile

# Called with the row, the buffer that holds its vectors, and their offset there; None when they are
# a list of registers.
StoreRow = Callable[[Any, Any, Any], None]


def store_tile(
    tile: RegisterTile, rows: Sequence[Any], count: int, epilogue: Epilogue, store_row: StoreRow
) -> None:
    """Store every row of a tile that exists.

    Parameters
    ----------
    tile : RegisterTile
        The sums.
    rows : sequence of expr
        The matrix row of each; slots behind the last row have rows from `count` on.
    count : int
        Rows of the matrix.
    epilogue : Epilogue
        Where it is long, its code stands in a loop over the rows, once and not for each of them.
    store_row : callable
        Applies the epilogue to one row and stores it.
    """
    if is_long(epilogue):
        scratch = B.alloc_buffer((tile.mr * tile.width,), "float32", scope="global")
        order = B.alloc_buffer((tile.mr,), "int32", scope="global")
        tile.write(scratch, lambda r: r * tile.width)
        for r, row in enumerate(rows):
            B.buffer_store(order, row, [r])
        with B.serial(0, tile.mr) as r, B.If(order[r] < count), B.Then():
            store_row(order[r], scratch, r * tile.width)
        return
    for r, row in enumerate(rows):
        if count % tile.mr:
            with B.If(row < count), B.Then():
                store_row(row, tile.acc[r], None)
        else:
            store_row(row, tile.acc[r], None)
