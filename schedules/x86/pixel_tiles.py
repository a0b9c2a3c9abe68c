"""How an image is cut into rectangles of pixels, each a register tile's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as B

from ...panels import Tiles, split_evenly
from ...workload import Geometry, MatmulGeometry


@dataclass(frozen=True)
class Rectangle:
    """Some pixels of an image: `height` rows of `width`, from row `top` and column `left` on.

    `number` counts the rectangles of an image.
    """

    top: Any
    left: Any
    height: int
    width: int
    number: Any

    def offsets(self, row_step: int, step: int) -> list[int]:
        """Tell how far each pixel lies behind the first one, by the distances of neighbours."""
        return [y * row_step + x * step for y in range(self.height) for x in range(self.width)]


@dataclass(frozen=True)
class PixelTiles:
    """An image of `height` x `width` pixels in rectangles of at most `most` pixels.

    Whole rows where one fits, else equal pieces of a row. No two overlap: sums of a pixel are kept
    between blocks of columns.
    """

    height: int
    width: int
    most: int

    @property
    def across(self) -> Tiles:
        """Columns of a rectangle, and how many of them a row takes."""
        return split_evenly(self.width, self.most, 1)

    @property
    def down(self) -> Tiles:
        """Rows of a rectangle, and how many of them an image takes."""
        return split_evenly(self.height, max(1, self.most // self.width), 1)

    @property
    def total(self) -> int:
        """Number of rectangles."""
        return self.across.total * self.down.total

    def sizes(self) -> list[tuple[int, int]]:
        """List the pixels of each size of rectangle, and how many there are of it."""
        return [
            (height * width, rows * columns)
            for height, rows, _, _ in _pieces(self.down)
            for width, columns, _, _ in _pieces(self.across)
        ]

    def emit(self, emit_tile: Callable[[Rectangle], None]) -> None:
        """Emit a loop over all rectangles; code of its own for each size."""
        for height, rows, row, top in _pieces(self.down):
            with B.serial(0, rows) as y:
                for width, columns, column, left in _pieces(self.across):
                    with B.serial(0, columns) as x:
                        number = (row + y) * self.across.total + column + x
                        emit_tile(
                            Rectangle(top + y * height, left + x * width, height, width, number)
                        )


def pixel_tiles(geometry: Geometry, most: int) -> PixelTiles:
    """Cut the pixels of an image, or all tokens."""
    if isinstance(geometry, MatmulGeometry):
        assert geometry.n is not None
        return PixelTiles(1, geometry.n, most)
    return PixelTiles(geometry.out_height, geometry.out_width, most)


def _pieces(tiles: Tiles) -> list[tuple[int, int, int, int]]:
    """Length and number of the longer pieces, their first one and its start; of the shorter ones.

    There may be none of the shorter ones.
    """
    pieces = [
        (tiles.nt, tiles.full, 0, 0),
        (tiles.nt_rest, tiles.rest, tiles.full, tiles.nt * tiles.full),
    ]
    return [piece for piece in pieces if piece[1]]
