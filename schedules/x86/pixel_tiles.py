"""How an image is cut into rectangles of pixels, each a register tile's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm.tirx.script import builder as B

from ...panels import Tiles, split_evenly


@dataclass(frozen=True)
class Rectangle:
    """Some pixels of an image: `height` rows of `width`, from row `top` and column `left` on."""

    top: Any
    left: Any
    height: int
    width: int

    @property
    def pixels(self) -> list[tuple[Any, Any]]:
        """Row and column of each pixel."""
        return [
            (self.top + y, self.left + x) for y in range(self.height) for x in range(self.width)
        ]


@dataclass(frozen=True)
class PixelTiles:
    """An image of `height` x `width` pixels in rectangles of at most `most` pixels.

    Whole rows where one fits, else equal pieces of a row. No two overlap: sums of a pixel are kept
    between blocks of columns.
    """

    height: int
    width: int
    most: int

    @cached_property
    def across(self) -> Tiles:
        """Columns of a rectangle, and how many of them a row takes."""
        return split_evenly(self.width, self.most, 1)

    @cached_property
    def down(self) -> Tiles:
        """Rows of a rectangle, and how many of them an image takes."""
        return split_evenly(self.height, max(1, self.most // self.width), 1)

    def sizes(self) -> list[tuple[int, int]]:
        """List the pixels of each size of rectangle, and how many there are of it."""
        return [
            (height * width, rows * columns)
            for height, rows, _ in _pieces(self.down)
            for width, columns, _ in _pieces(self.across)
        ]

    def emit(self, emit_tile: Callable[[Rectangle], None]) -> None:
        """Emit a loop over all rectangles; code of its own for each size."""
        for height, rows, top in _pieces(self.down):
            with B.serial(0, rows) as y:
                for width, columns, left in _pieces(self.across):
                    with B.serial(0, columns) as x:
                        emit_tile(Rectangle(top + y * height, left + x * width, height, width))


def _pieces(tiles: Tiles) -> list[tuple[int, int, int]]:
    """Length, number and start of the longer pieces, and of the shorter ones if there are any."""
    pieces = [(tiles.nt, tiles.full, 0), (tiles.nt_rest, tiles.rest, tiles.nt * tiles.full)]
    return [piece for piece in pieces if piece[1]]
