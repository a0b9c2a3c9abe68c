"""Activations with neighbouring columns in memory, for tensor cores: any rows may be gathered.

Shared memory holds a chunk's rows (features, or taps of channels) one behind the other, in pieces
of 16 bytes whose places are shifted by the row, so that the eight rows that are read as a matrix
lie on different banks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from .ptx import copy_async, load_matrices
from .tensor_tiles import FRAGMENT_COLUMNS, TensorShape, WarpPlace
from .threads import Threads, local
from .token_rows import PIECE, shifted

# Elements that one asynchronous copy can take, the widest first.
_COPIED = (8, 4, 2)


def copied_at_once(extent: int | None) -> int:
    """Tell how many elements may be copied as one where rows have so many; 1: none, by value."""
    if extent is None:
        return 1
    return next((width for width in _COPIED if extent % width == 0), 1)


class GatheredColumns:
    """The staging of a tile; subclasses say where an element is, and write results.

    Attributes
    ----------
    width : int
        Elements that are brought as one: 1 by way of registers, more by an asynchronous copy.
    """

    entry_words = 1

    def __init__(self, shape: TensorShape, width: int) -> None:
        self.shape, self.width = shape, width
        self.pieces = shape.nt // PIECE

    def source(self, entry: Sequence[Any], column: Any) -> tuple[Any, Any]:
        """Return the element of a gathered row at a column of the tile, and whether it is there.

        `entry` is what the list of columns says; the condition is None where it always is.
        """
        raise NotImplementedError

    def begin_columns(self, threads: Threads, place: WarpPlace, ring: Any) -> None:
        """Reserve registers."""
        shape = self.shape
        self.threads, self.place, self.ring = threads, place, ring
        self.slot_size = shape.kb * shape.nt
        self.across = shape.nt // self.width
        self.total = shape.kb * self.across
        self.turns = -(-self.total // threads.count)
        # Entries of the list that a thread needs: it may stay at one row of the chunk.
        self.entries = local(self.turns * self.entry_words, "int32")
        if self.width == 1:
            self.held = local(self.turns, shape.dtype)

    def _piece(self, turn: int) -> tuple[Any, Any, Any]:
        """Return the number of a thread's piece, and its row and column in the chunk."""
        i = turn * self.threads.count + self.threads.number
        return i, T.floordiv(i, self.across), T.floormod(i, self.across) * self.width

    def look_up(self, columns: Any, chunk: Any) -> None:
        """Read which rows of the activations a chunk wants."""
        words = self.entry_words
        for turn in range(self.turns):
            i, row, _ = self._piece(turn)
            first = (chunk * self.shape.kb + row) * words
            with _only(i < self.total, (turn + 1) * self.threads.count > self.total):
                for word in range(words):
                    B.buffer_store(self.entries, columns[first + word], [turn * words + word])

    def _entry(self, turn: int) -> list[Any]:
        words = self.entry_words
        return [self.entries[turn * words + word] for word in range(words)]

    def _place(self, slot: Any, row: Any, column: Any) -> Any:
        """Tell where an element lies in shared memory."""
        piece, rest = T.floordiv(column, PIECE), T.floormod(column, PIECE)
        at = slot * self.slot_size + row * self.shape.nt
        return at + shifted(piece, row, self.pieces) * PIECE + rest

    def fetch(self, slot: Any) -> None:
        """Start copies, or read elements to registers."""
        for turn in range(self.turns):
            i, row, column = self._piece(turn)
            with _only(i < self.total, (turn + 1) * self.threads.count > self.total):
                element, is_there = self.source(self._entry(turn), column)
                if self.width > 1:
                    to = self.ring[self._place(slot, row, column)]
                    copy_async(to, element, 2 * self.width, is_there)
                else:
                    zero = T.Cast(self.shape.dtype, T.float32(0))
                    value = element if is_there is None else T.if_then_else(is_there, element, zero)
                    B.buffer_store(self.held, value, [turn])

    def arrive(self, slot: Any) -> None:
        """Bring what registers hold to shared memory."""
        if self.width > 1:
            return
        for turn in range(self.turns):
            i, row, column = self._piece(turn)
            with _only(i < self.total, (turn + 1) * self.threads.count > self.total):
                B.buffer_store(self.ring, self.held[turn], [self._place(slot, row, column)])

    def load(self, registers: Any, slot: Any, step: Any, steps: int) -> None:
        """Load fragments: rows of the matrices are gathered rows, so they are transposed."""
        shape, lane = self.shape, self.threads.lane
        row, matrix = T.floormod(lane, 8), T.floordiv(lane, 8)
        per_fragment = 2 * steps
        first = self.place.n * shape.nf
        at_once = 2 if per_fragment == 2 and shape.nf % 2 == 0 else 1
        for j in range(0, shape.nf, at_once):
            fragment = T.floordiv(matrix, per_fragment) if at_once == 2 else 0
            k = step * 16 + T.floormod(matrix, per_fragment) * 8 + row
            column = (first + j + fragment) * FRAGMENT_COLUMNS
            source = self.ring[self._place(slot, k, column)]
            load_matrices(registers[j * per_fragment], source, per_fragment * at_once, True)


class _only:
    """Emit statements for the threads that a condition holds for, if it need not hold for all."""

    def __init__(self, condition: Any, needed: bool) -> None:
        self.frames = [B.If(condition), B.Then()] if needed else []

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)
