"""The order in which a packed weight holds rows and columns, and a weight seen in that order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Elements that are reordered at a time.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class PackedOrder:
    """Where a format puts the rows and columns of a matrix [M, K].

    Attributes
    ----------
    rows : numpy.ndarray
        int32 [orders, slots]: the matrix row of each slot; a row >= M is padding. There is one
        order of rows for the whole matrix, or one for each block of columns.
    together : int
        Neighbouring slots that hold a column as soon as one of them needs it.
    block : int
        Columns among which those that no slot needs are left out.
    run : int
        Neighbouring columns that are held, or left out, as one.
    """

    rows: np.ndarray = field(repr=False)
    together: int = 1
    block: int = 1 << 30
    run: int = 1

    def nonzeros(self, weight: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Find the nonzeros of a weight where the format holds them, some slots at a time.

        In every block the columns that are held move together to its left end.

        Parameters
        ----------
        weight : numpy.ndarray
            [M, K], the matrix that was packed.

        Yields
        ------
        tuple of numpy.ndarray
            Slots and places of nonzeros: 0 <= slot < slots, 0 <= place < K.
        """
        filled, columns = weight != 0, weight.shape[1]
        if len(self.rows) == 1:
            yield from self._in_columns(filled, 0, columns)
            return
        for number, first in enumerate(range(0, columns, self.block)):
            yield from self._in_columns(filled[:, first : first + self.block], number, columns)

    def _in_columns(
        self, filled: np.ndarray, number: int, all_columns: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Find the nonzeros of columns that share an order of rows, the `number`th."""
        order, first = self.rows[number], number * self.block if len(self.rows) > 1 else 0
        rows, columns = filled.shape
        together = min(self.together, len(order))
        step = max(1, _AT_ONCE // max(1, columns) // together) * together
        for begin in range(0, len(order), step):
            slots = order[begin : begin + step]
            taken = filled[np.minimum(slots, rows - 1)]
            taken[slots >= rows] = False
            slot, column = np.nonzero(taken)
            place = self._places(taken, together)[slot // together, column]
            yield slot + begin, np.minimum(place + first, all_columns - 1)

    def _places(self, taken: np.ndarray, together: int) -> np.ndarray:
        """Tell which place each column has in each group of slots: int32 [groups, columns]."""
        slots, columns = taken.shape
        block = min(self.block, -(-columns // self.run) * self.run)
        padded = -(-columns // block) * block
        groups = -(-slots // together)
        held = np.zeros((groups * together, padded), bool)
        held[:slots, :columns] = taken
        cut = held.reshape(groups, together, -1, block // self.run, self.run)
        units = np.any(cut, axis=(1, 4))
        rank = np.cumsum(units, axis=2, dtype=np.int32) - units
        rank += (np.arange(units.shape[1], dtype=np.int32) * (block // self.run))[:, None]
        places = rank[..., None] * self.run + np.arange(self.run, dtype=np.int32)
        return places.reshape(groups, padded)


def rows_as_they_are(rows: int) -> np.ndarray:
    """Give every row the slot of its number."""
    return np.arange(rows, dtype=np.int32)[None]
