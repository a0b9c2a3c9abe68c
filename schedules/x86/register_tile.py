"""The register tile of the panel kernels: accumulators, and the multiply-adds into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..vectors import Vectors


class RegisterTile:
    """`mr` x `nt` accumulators of one vector each."""

    def __init__(self, vectors: Vectors, mr: int, nt: int) -> None:
        self.vectors, self.mr, self.nt = vectors, mr, nt
        self.width = nt * vectors.lanes
        self.acc = [[vectors.register() for _ in range(nt)] for _ in range(mr)]
        self.shared = [vectors.register() for _ in range(nt)]

    def clear(self) -> None:
        """Set every accumulator to zero."""
        for row in self.acc:
            for register in row:
                self.vectors.store(register, self.vectors.zero())

    def add(self, buffer: Any, base_of: Callable[[int], Any]) -> None:
        """Add to row r of the tile what `buffer` holds at `base_of(r)`."""
        v = self.vectors
        for r, row in enumerate(self.acc):
            for j, register in enumerate(row):
                held = v.load(buffer, base_of(r) + j * v.lanes)
                v.store(register, v.load(register) + held)

    def write(self, buffer: Any, base_of: Callable[[int], Any]) -> None:
        """Store row r of the tile to `buffer` at `base_of(r)`."""
        for r, row in enumerate(self.acc):
            for j, register in enumerate(row):
                value = self.vectors.load(register)
                self.vectors.store(buffer, value, base_of(r) + j * self.vectors.lanes)

    def multiply(self, rows: list[int], weight_of: Callable[[int], Any], x: Any, base: Any) -> None:
        """Add weight_of(q) * x[base:] to accumulator row rows[q]; x is loaded once.

        `weight_of` returns a vector that holds one weight in every lane.
        """
        v, lanes = self.vectors, self.vectors.lanes
        if len(rows) > 1:
            for j, register in enumerate(self.shared):
                v.store(register, v.load(x, base + j * lanes))
        for q, r in enumerate(rows):
            weight = weight_of(q)
            for j, register in enumerate(self.acc[r]):
                operand = v.load(self.shared[j]) if len(rows) > 1 else v.load(x, base + j * lanes)
                v.store(register, v.load(register) + weight * operand)
