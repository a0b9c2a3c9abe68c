"""A spy plot as data: how dense the cells are that a weight matrix is divided into."""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Levels of grey: as many as half a byte tells apart.
LEVELS = 16
_LONGER = 4


@dataclass(frozen=True)
class Spy:
    """The nonzeros of a matrix, seen from so far away that a cell holds many elements.

    Attributes
    ----------
    height, width : int
        Cells.
    densest : float
        Density of the densest cell.
    cells : str
        One byte a cell, row by row, compressed by zlib and written in base64: 0 where there is
        no nonzero, else 1 to 15, as the root of the cell's density is to that of the densest.
    """

    height: int
    width: int
    densest: float
    cells: str

    @classmethod
    def of(cls, height: int, width: int, densest: float, levels: bytes) -> Spy:
        """Hold `levels`, one byte a cell."""
        # Filtered: what repeats by chance is not worth a reference.
        writer = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
        packed = writer.compress(levels) + writer.flush()
        return cls(height, width, densest, base64.b64encode(packed).decode())

    def levels(self) -> bytes:
        """Return the level of every cell, row by row.

        Raises
        ------
        ValueError
            When `cells` is not what it should be.
        """
        expected = self.height * self.width
        try:
            # No more than there may be: what a report of unknown origin holds may be far longer.
            reader = zlib.decompressobj()
            found = reader.decompress(base64.b64decode(self.cells, validate=True), expected + 1)
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"the picture is broken: {error}") from None
        if len(found) != expected or max(found, default=0) >= LEVELS:
            raise ValueError(f"the picture is not of {self.height} x {self.width} cells")
        return found

    @classmethod
    def from_data(cls, entry: Mapping[str, Any]) -> Spy:
        """Read what `dataclasses.asdict` and JSON made of a picture.

        Raises
        ------
        KeyError, TypeError, ValueError
            When it is none.
        """
        found = cls(
            int(entry["height"]),
            int(entry["width"]),
            float(entry["densest"]),
            str(entry["cells"]),
        )
        found.levels()
        return found


def cells_of(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Divide a matrix into at most `most` cells that are about square: (height, width).

    A matrix of at most `most` elements has a cell for each; very long ones have fewer.
    """
    if rows * columns <= most:
        height, width = rows, columns
    else:
        height = max(1, min(rows, most, int(rows / math.sqrt(rows * columns / most))))
        width = max(1, min(columns, most // height))
    longest = _LONGER * math.isqrt(most)
    return min(height, longest), min(width, longest)
