"""Bitmaps and nonzeros to fragments of tensor cores, in registers: see `formats.bitmap_tiles`.

Chunks lie in shared memory as they came. A lane finds its eight elements of a fragment by one count
of bits, and then reads a value wherever a bit is set. The values of a fragment are neighbours, so
as long as there are at most 64, a quarter of its elements, they lie on different banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...formats.bitmap_tiles import (
    GROUP_LANES,
    GROUPS,
    LANE_ELEMENTS,
    PIECE_BYTES,
    header_bytes,
    map_bytes,
)
from .ptx import copy_async, expand_pairs
from .tensor_tiles import TensorShape, WarpPlace
from .threads import Threads, kept, local, part_of
from .token_rows import RUN

_PIECE_WORDS = PIECE_BYTES // 4
_REGISTERS = LANE_ELEMENTS // 2


@dataclass(frozen=True)
class BitmapShape(TensorShape):
    """What a block of threads computes with a weight of bitmaps.

    Attributes
    ----------
    columns : int
        Of the weight.
    most : int
        Of the packed format.
    """

    columns: int = 0
    most: int = 0

    @property
    def slot_bytes(self) -> int:
        """Shared memory of a chunk of the weight."""
        return header_bytes(self.mt, self.kb) + 2 * self.most

    @property
    def weight_bytes(self) -> int:
        """Shared memory of the weight's chunks."""
        return self.stages * self.slot_bytes


class BitmapWeight:
    """The weight of a tile; warps decode the fragments that they multiply."""

    def __init__(self, shape: BitmapShape) -> None:
        self.shape = shape

    def declare(self) -> None:
        """Declare the arrays."""
        chunks, words = tirx.Var("n_chunks", "int64"), tirx.Var("n_words", "int64")
        places = tirx.Var("n_places", "int64")
        tiles = self.shape.tiles
        self.tiles = B.arg("tiles", B.Buffer((tiles,), "int32"))
        self.begins = B.arg("begins", B.Buffer((tiles + 1,), "int32"))
        self.first_columns = B.arg("columns", B.Buffer((chunks,), "int32"))
        self.places = B.arg("places", B.Buffer((places,), "int32"))
        self.stream = B.arg("stream", B.Buffer((words,), "uint32"))

    def begin(self, number: Any, memory: Any, threads: Threads, place: WarpPlace) -> Any:
        """View shared memory as what it holds, and find the lane's bits of a map."""
        shape, lane = self.shape, threads.lane
        self.threads, self.place = threads, place
        size = shape.weight_bytes
        self.words = part_of(memory, 0, size // 4, "uint32")
        self.halves = part_of(memory, 0, size // 2, "uint16")
        self.maps = part_of(memory, 0, size // 8, "uint64")
        self.group = kept(T.floordiv(lane, GROUP_LANES))
        self.shift = kept(T.floormod(lane, GROUP_LANES) * LANE_ELEMENTS)
        self.below = local(1, "uint64")
        bit = T.shift_left(T.uint64(1), T.Cast("uint64", self.shift))
        B.buffer_store(self.below, bit - T.uint64(1), [0])
        # Where the next chunk begins, and its pieces.
        self.next = local(2, "int32")
        return kept(self.tiles[number])

    def chunks(self, part: str, tile: Any) -> tuple[Any, Any]:
        """Read where a tile's chunks begin and end."""
        return kept(self.begins[tile]), kept(self.begins[tile + 1])

    def columns(self, part: str) -> Any:
        """Return the columns of a chunk's runs as if they were listed."""
        return _Runs(self.shape, self.first_columns)

    def look_up(self, part: str, chunk: Any) -> None:
        """Read where a chunk lies."""
        B.buffer_store(self.next, self.places[chunk], [0])
        B.buffer_store(self.next, self.places[chunk + 1] - self.next[0], [1])

    def fetch(self, part: str, chunk: Any, slot: Any) -> None:
        """Copy a chunk's bitmaps and values, as many as there are."""
        slot_bytes, count = self.shape.slot_bytes, self.threads.count
        for turn in range(-(-slot_bytes // (PIECE_BYTES * count))):
            piece = turn * count + self.threads.number
            with B.If(piece < self.next[1]), B.Then():
                to = self.words[slot * (slot_bytes // 4) + piece * _PIECE_WORDS]
                copy_async(to, self.stream[(self.next[0] + piece) * _PIECE_WORDS], PIECE_BYTES)

    def load(self, a: Any, chosen: Any, i: int, step: Any, slot: Any) -> None:
        """Decode a fragment."""
        shape = self.shape
        number = shape.fragment(step, i, self.place) * GROUPS + self.group
        bitmap = local(1, "uint64")
        B.buffer_store(bitmap, self.maps[slot * (shape.slot_bytes // 8) + number], [0])
        chunk = slot * (shape.slot_bytes // 2)
        begins, values = map_bytes(shape.mt, shape.kb) // 2, header_bytes(shape.mt, shape.kb) // 2
        first = T.Cast("int32", self.halves[chunk + begins + number])
        before = T.Cast("int32", T.popcount(T.bitwise_and(bitmap[0], self.below[0])))
        bits = T.Cast("uint32", T.shift_right(bitmap[0], T.Cast("uint64", self.shift)))
        source = self.halves[chunk + values + first + before]
        expand_pairs(a[i * _REGISTERS], source, bits, _REGISTERS)

    def row(self, place: Any) -> Any:
        """Return the place: no row was moved."""
        return place


class _Runs:
    """The first column of each run of eight, of which a chunk has `kb / 8`.

    Runs behind the last column repeat its run: their bits are zero, and what they are multiplied by
    is what other bits of the same row are.
    """

    def __init__(self, shape: BitmapShape, first_columns: Any) -> None:
        self.shape, self.first_columns = shape, first_columns

    def __getitem__(self, run: Any) -> Any:
        shape = self.shape
        runs = shape.kb // RUN
        column = self.first_columns[T.floordiv(run, runs)] + T.floormod(run, runs) * RUN
        return T.min(column, shape.columns - RUN) if shape.columns % shape.kb else column
