"""Tokens in rows for tensor cores: x [n][k] in runs of eight features, y [n][m] out.

Shared memory holds a chunk's features of each token in a row, in pieces of 16 bytes. The pieces of
eight neighbouring tokens lie on different banks: their places in the row are shifted by the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Epilogue, MatmulGeometry
from .ptx import copy_async, load_matrices
from .results import Results
from .slabs import RowOf, store_token_rows
from .tensor_tiles import FRAGMENT_COLUMNS, TensorShape, WarpPlace
from .threads import Threads, local

# Features that are fetched as one, and pieces of 16 bytes that cover all banks.
RUN, BANKS_PIECES = 8, 8


def shifted(piece: Any, row: Any, pieces: int) -> Any:
    """Shift a piece's place in its row, so that eight rows' pieces lie on different banks.

    `pieces` is how many a row has; rows of fewer than eight share a pass over the banks.
    """
    if pieces == 1:
        return piece
    together = max(1, BANKS_PIECES // pieces)
    turn = T.floormod(T.floordiv(row, together), min(pieces, BANKS_PIECES))
    return T.bitwise_xor(piece, turn)


class TokenRows:
    """A tile of tokens whose features come in runs of eight."""

    def __init__(self, geometry: MatmulGeometry, epilogue: Epilogue, shape: TensorShape) -> None:
        self.geometry, self.shape = geometry, shape
        self.tokens = tirx.Var("n", "int64") if geometry.n is None else geometry.n
        self.results = Results(epilogue, geometry.m, (self.tokens, geometry.m), shape.dtype)
        self.pieces = shape.kb // shape.piece

    def declare_input(self) -> None:
        """Declare x."""
        self.x = B.arg("x", B.Buffer((self.tokens, self.geometry.k), self.shape.dtype))

    def declare_output(self) -> None:
        """Declare what the epilogue reads, and y."""
        self.results.declare()

    def grid(self) -> dict[str, Any]:
        """Tiles of tokens."""
        return {"y": tiles_of(self.geometry.n, self.tokens, self.shape.nt)}

    def prepare(self) -> None:
        """Do nothing: x is read as it is."""

    def begin(self, numbers: Sequence[Any], threads: Threads, place: WarpPlace, ring: Any) -> None:
        """Prepare a tile of tokens."""
        self.first, self.threads, self.place = numbers[0] * self.shape.nt, threads, place
        self.slot_size = self.shape.slot_elements
        self.ring = ring
        # A thread fetches the same piece of one token after the other, if the threads allow it.
        self.turns = -(-self.shape.nt * self.pieces // threads.count)
        self.same = threads.count % self.pieces == 0
        self.columns = local(1 if self.same else self.turns, "int32")

    def look_up(self, columns: Any, chunk: Any) -> None:
        """Read which features the pieces of a chunk are."""
        piece_size, runs = self.shape.piece, self.shape.kb // RUN
        for turn in range(1 if self.same else self.turns):
            piece = T.floormod(turn * self.threads.count + self.threads.number, self.pieces)
            feature = piece * piece_size
            entry = columns[chunk * runs + T.floordiv(feature, RUN)]
            B.buffer_store(self.columns, entry + T.floormod(feature, RUN), [turn])

    def fetch(self, slot: Any) -> None:
        """Copy pieces; tokens behind the last one are zeros."""
        shape, total = self.shape, self.shape.nt * self.pieces
        for turn in range(self.turns):
            i = turn * self.threads.count + self.threads.number
            token, piece = T.floordiv(i, self.pieces), T.floormod(i, self.pieces)
            at = slot * self.slot_size + token * shape.kb
            to = self.ring[at + shifted(piece, token, self.pieces) * shape.piece]
            n = self.first + token
            source = self.x[n, self.columns[0 if self.same else turn]]
            if (turn + 1) * self.threads.count > total:
                with B.If(i < total), B.Then():
                    copy_async(to, source, 16, n < self.tokens)
            else:
                copy_async(to, source, 16, n < self.tokens)

    def arrive(self, slot: Any) -> None:
        """Do nothing: copies arrive by themselves."""

    def load(self, registers: Any, slot: Any, unit: Any, units: int) -> None:
        """Load fragments: tokens are the rows of the matrices."""
        lane = self.threads.lane
        row, matrix = T.floormod(lane, 8), T.floordiv(lane, 8)
        per_fragment = 2 * units
        first = self.place.n * (self.shape.nf * FRAGMENT_COLUMNS)
        at_once = 2 if per_fragment == 2 and self.shape.nf % 2 == 0 else 1
        for j in range(0, self.shape.nf, at_once):
            fragment = T.floordiv(matrix, per_fragment) if at_once == 2 else 0
            token = first + (j + fragment) * FRAGMENT_COLUMNS + row
            piece = unit * 2 + T.floormod(matrix, per_fragment)
            at = slot * self.slot_size + token * self.shape.kb
            source = self.ring[at + shifted(piece, token, self.pieces) * self.shape.piece]
            count = per_fragment * at_once
            load_matrices(registers[j * per_fragment], source, count, False)

    def store(self, slab: Any, row_of: RowOf) -> None:
        """Write the results of a slab."""
        store_token_rows(
            slab, self.shape, self.threads, self.results, row_of, self.first, self.tokens
        )


def tiles_of(static: int | None, extent: Any, width: int) -> Any:
    """Count the tiles of `width` columns that cover `extent` of them."""
    return T.ceildiv(extent, width) if static is None else -(-static // width)
