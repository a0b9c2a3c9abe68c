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


class TileStore:
    """Stores the rows of tiles that exist: slots behind the last row have rows from `rows` on.

    Where the epilogue is long, its code stands in a loop over the rows, once and not for each.
    """

    def __init__(self, epilogue: Epilogue, rows: int) -> None:
        self.in_a_loop, self.rows = is_long(epilogue), rows

    def reserve(self, mr: int, width: int) -> None:
        """Reserve what a unit of work needs: TVM has buffers of this size on the heap."""
        if self.in_a_loop:
            self.scratch = B.alloc_buffer((mr * width,), "float32", scope="global")
            self.order = B.alloc_buffer((mr,), "int32", scope="global")

    def store(self, tile: RegisterTile, rows: Sequence[Any], store_row: StoreRow) -> None:
        """Store a tile; `rows` are the matrix rows of its slots."""
        if self.in_a_loop:
            tile.write(self.scratch, lambda r: r * tile.width)
            for r, row in enumerate(rows):
                B.buffer_store(self.order, row, [r])
            with B.serial(0, tile.mr) as r, B.If(self.order[r] < self.rows), B.Then():
                store_row(self.order[r], self.scratch, r * tile.width)
            return
        for r, row in enumerate(rows):
            if self.rows % tile.mr:
                with B.If(row < self.rows), B.Then():
                    store_row(row, tile.acc[r], None)
            else:
                store_row(row, tile.acc[r], None)
