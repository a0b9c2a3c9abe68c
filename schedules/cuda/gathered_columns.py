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
from .results import Results
from .tensor_tiles import FRAGMENT_COLUMNS, TensorShape, WarpPlace
from .threads import Threads, local
from .token_rows import shifted

# Bytes that one asynchronous copy can take, the widest first.
_COPIED_BYTES = (16, 8, 4)


def copied_at_once(extent: int | None, element_bytes: int) -> int:
    """Tell how many elements may be copied as one where rows have so many; at least one."""
    widths = (size // element_bytes for size in _COPIED_BYTES if size >= element_bytes)
    return next((width for width in widths if extent is not None and extent % width == 0), 1)


class GatheredColumns:
    """The staging of a tile; subclasses say where an element is, and write results.

    Attributes
    ----------
    width : int
        Elements that are brought as one.
    copies : bool
        Whether they are copied asynchronously; less than four bytes go by way of registers.
    results : Results
        Where results go; subclasses set it.
    first : PrimExpr
        The first column of the tile.
    """

    entry_words = 1
    results: Results

    def __init__(self, shape: TensorShape, width: int) -> None:
        self.shape, self.width = shape, width
        self.copies = width * shape.element_bytes >= _COPIED_BYTES[-1]
        self.pieces = shape.nt // shape.piece

    def source(self, entry: Sequence[Any], column: Any) -> tuple[Any, Any]:
        """Return the element of a gathered row at a column of the tile, and whether it is there.

        `entry` is what the list of columns says; the condition is None where it always is.
        """
        raise NotImplementedError

    def declare_output(self) -> None:
        """Declare what the epilogue reads, and y."""
        self.results.declare()

    def prepare(self) -> None:
        """Do nothing: x is read as it is."""

    def begin(self, numbers: Sequence[Any], threads: Threads, place: WarpPlace, ring: Any) -> None:
        """Prepare a tile of columns, and reserve registers."""
        shape = self.shape
        self.first = numbers[0] * shape.nt
        self.threads, self.place, self.ring = threads, place, ring
        self.slot_size = shape.slot_elements
        self.across = shape.nt // self.width
        self.total = shape.kb * self.across
        self.turns = -(-self.total // threads.count)
        # Entries of the list that a thread needs: it may stay at one row of the chunk.
        self.entries = local(self.turns * self.entry_words, "int32")
        if not self.copies:
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
        at = slot * self.slot_size
        if self.shape.element_bytes == 4:
            return at + self.shape.gathered_lines.start(row) + column
        at += row * self.shape.nt
        size = self.shape.piece
        piece, rest = T.floordiv(column, size), T.floormod(column, size)
        return at + shifted(piece, row, self.pieces) * size + rest

    def fetch(self, slot: Any) -> None:
        """Start copies, or read elements to registers."""
        for turn in range(self.turns):
            i, row, column = self._piece(turn)
            with _only(i < self.total, (turn + 1) * self.threads.count > self.total):
                element, is_there = self.source(self._entry(turn), column)
                if self.copies:
                    to = self.ring[self._place(slot, row, column)]
                    copy_async(to, element, self.shape.element_bytes * self.width, is_there)
                else:
                    zero = T.Cast(self.shape.dtype, T.float32(0))
                    value = element if is_there is None else T.if_then_else(is_there, element, zero)
                    B.buffer_store(self.held, value, [turn])

    def arrive(self, slot: Any) -> None:
        """Bring what registers hold to shared memory."""
        if self.copies:
            return
        for turn in range(self.turns):
            i, row, column = self._piece(turn)
            with _only(i < self.total, (turn + 1) * self.threads.count > self.total):
                B.buffer_store(self.ring, self.held[turn], [self._place(slot, row, column)])

    def load(self, registers: Any, slot: Any, unit: Any, units: int) -> None:
        """Load fragments: of 16-bit elements, transposed matrices of gathered rows."""
        if self.shape.element_bytes == 4:
            self._load_words(registers, slot, unit, units)
            return
        shape, lane = self.shape, self.threads.lane
        row, matrix = T.floormod(lane, 8), T.floordiv(lane, 8)
        per_fragment = 2 * units
        first = self.place.n * shape.nf
        at_once = 2 if per_fragment == 2 and shape.nf % 2 == 0 else 1
        for j in range(0, shape.nf, at_once):
            fragment = T.floordiv(matrix, per_fragment) if at_once == 2 else 0
            k = unit * 16 + T.floormod(matrix, per_fragment) * 8 + row
            column = (first + j + fragment) * FRAGMENT_COLUMNS
            source = self.ring[self._place(slot, k, column)]
            load_matrices(registers[j * per_fragment], source, per_fragment * at_once, True)

    def _load_words(self, registers: Any, slot: Any, unit: Any, units: int) -> None:
        """Load fragments of float32, a word each: register i has row 4i + lane % 4 of a unit."""
        lane = self.threads.lane
        for j in range(self.shape.nf):
            column = (self.place.n * self.shape.nf + j) * FRAGMENT_COLUMNS + T.floordiv(lane, 4)
            for i in range(2 * units):
                k = unit * 8 + 4 * i + T.floormod(lane, 4)
                word = T.reinterpret("uint32", self.ring[self._place(slot, k, column)])
                B.buffer_store(registers, word, [j * 2 * units + i])


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
