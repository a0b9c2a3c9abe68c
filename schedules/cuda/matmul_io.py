"""Tokens in rows around a tile of a GPU kernel: x [n][k] in, y [n][m] out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Epilogue, MatmulGeometry
from .results import Results
from .row_tiles import TileShape
from .threads import WARP, Threads, barrier


class MatmulTile:
    """A tile of tokens, feature by feature in shared memory; a lane sums up `nt` of them."""

    def __init__(self, geometry: MatmulGeometry, epilogue: Epilogue, shape: TileShape) -> None:
        self.geometry, self.shape = geometry, shape
        self.tokens = tirx.Var("n", "int64") if geometry.n is None else geometry.n
        self.results = Results(epilogue, geometry.m, (self.tokens, geometry.m))
        # Features that a thread reads as one vector.
        self.vector = 4 if geometry.k % 4 == 0 and shape.kb % 4 == 0 else 1

    @property
    def shared_floats(self) -> int:
        """The staged tokens, or the results on their way out."""
        return max(self.shape.kb * self.shape.width, self.shape.mt * (self.shape.width + 1))

    @property
    def registers_a_column(self) -> int:
        """Registers beside the sums that each column of a lane takes."""
        return 10

    def declare_input(self) -> None:
        """Declare x."""
        self.x = B.arg("x", B.Buffer((self.tokens, self.geometry.k), "float32"))

    def declare_output(self) -> None:
        """Declare what the epilogue reads, and y."""
        self.results.declare()

    def grid(self) -> dict[str, Any]:
        """Tiles of tokens."""
        width = self.shape.width
        if self.geometry.n is None:
            return {"y": T.ceildiv(self.tokens, width)}
        return {"y": -(-self.geometry.n // width)}

    def begin(self, numbers: Sequence[Any], threads: Threads) -> None:
        """Prepare a tile of tokens."""
        self.first, self.threads = numbers[0] * self.shape.width, threads

    def stage(self, memory: Any, block: Any) -> None:
        """Turn a tile of tokens: lanes are tokens, so that shared memory takes them in a row."""
        width, kb, vector = self.shape.width, self.shape.kb, self.vector
        k = self.geometry.k
        lanes = B.ramp(0, 1, vector) if vector > 1 else 0
        read = B.alloc_buffer((vector,), "float32", scope="local")
        with self.threads.share(kb // vector * width) as i:
            token, feature = T.floormod(i, width), T.floordiv(i, width) * vector
            n, column = self.first + token, block * kb + feature
            with B.If(T.And(n < self.tokens, column < k)), B.Then():
                piece = B.ramp(column, 1, vector) if vector > 1 else column
                B.buffer_store(read, self.x[n, piece], [lanes])
                for j in range(vector):
                    B.buffer_store(memory, read[j], [(feature + j) * width + token])

    def offset(self, column: Any) -> Any:
        """Tell where a feature's tokens begin, in vectors: so TVM knows that they are aligned."""
        return column * WARP

    def multiply(self, memory: Any, sums: Any, turn: int, value: Any, at: Any) -> None:
        """Add the products of a lane's tokens."""
        nt = self.shape.nt
        base = (at + self.threads.lane) * nt
        if nt == 1:
            B.buffer_store(sums, sums[turn] + value * memory[base], [turn])
            return
        mine = B.ramp(turn * nt, 1, nt)
        product = B.broadcast(value, nt) * memory[B.ramp(base, 1, nt)]
        B.buffer_store(sums, sums[mine] + product, [mine])

    def store(self, memory: Any, sums: Any, rows: Sequence[Any], tile: Any) -> None:
        """Turn the results in shared memory, so that a token's features are written in a row."""
        nt, mt, width = self.shape.nt, self.shape.mt, self.shape.width
        pitch, lane = width + 1, self.threads.lane
        for turn, row in enumerate(rows):
            base = (row - tile * mt) * pitch + lane * nt
            for t in range(nt):
                B.buffer_store(memory, sums[turn * nt + t], [base + t])
        barrier()
        with self.threads.share(mt * width) as i:
            row, token = T.floormod(i, mt), T.floordiv(i, mt)
            m, n = tile * mt + row, self.first + token
            with B.If(T.And(m < self.geometry.m, n < self.tokens)), B.Then():
                self.results.store(memory[row * pitch + token], m, [n, m])
