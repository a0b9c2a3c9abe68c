"""Walks over one contiguous row: whole vectors in groups, then single ones, then a masked tail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..vectors import Vectors
from .dense_kernel import Dim, fold_lanes, load_padded

# Independent accumulators: they hide the latency of an addition.
GROUP = 4
# Rows of up to this many vectors are unrolled.
_UNROLLED = 16

# Called with an accumulator number, the offset in the row, and the valid lanes (None: all).
Visit = Callable[[int, Any, Any], None]


class Row:
    """A row of `length` elements; `size` is the same as an int64 expression."""

    def __init__(self, vectors: Vectors, size: Any, length: Dim) -> None:
        self.vectors = vectors
        self.size = size
        self.length = length

    def walk(self, visit: Visit) -> None:
        """Call `visit` for every vector of the row, in order."""
        lanes = self.vectors.lanes
        if isinstance(self.length, int):
            self._walk_static(visit, self.length // lanes, self.length % lanes)
            return
        groups = T.floordiv(self.size, T.int64(lanes * GROUP))
        self._walk_groups(visit, groups)
        singles = T.floordiv(self.size, T.int64(lanes)) - groups * GROUP
        with B.serial(0, singles) as i:
            visit(0, (groups * GROUP + i) * lanes, None)
        rest = T.floormod(self.size, T.int64(lanes))
        with B.If(rest > 0):
            with B.Then():
                visit(0, self.size - rest, T.Cast("int32", rest))

    def _walk_static(self, visit: Visit, whole: int, rest: int) -> None:
        lanes = self.vectors.lanes
        unrolled_from = 0
        if whole > _UNROLLED:
            unrolled_from = whole // GROUP * GROUP
            self._walk_groups(visit, T.int64(whole // GROUP))
        for index in range(unrolled_from, whole):
            visit(index % GROUP, T.int64(index * lanes), None)
        if rest:
            visit(whole % GROUP, T.int64(whole * lanes), T.int32(rest))

    def _walk_groups(self, visit: Visit, groups: Any) -> None:
        with B.serial(0, groups) as group:
            for slot in range(GROUP):
                visit(slot, (group * GROUP + slot) * self.vectors.lanes, None)

    def load(self, flat: Any, base: Any, count: Any, padding: float = 0.0) -> Any:
        """Read one vector of a walk."""
        if count is None:
            return self.vectors.load(flat, base)
        return load_padded(self.vectors, flat, base, count, padding)

    def store(self, flat: Any, value: Any, base: Any, count: Any) -> None:
        """Write one vector of a walk."""
        if count is None:
            self.vectors.store(flat, value, base)
        else:
            self.vectors.store_masked(flat, value, base, count)

    def accumulators(self, start: float) -> list[Any]:
        """Reserve and set one register per accumulator number."""
        registers = [self.vectors.register() for _ in range(GROUP)]
        for register in registers:
            self.vectors.store(register, self.vectors.splat(T.float32(start)))
        return registers

    def add_to(self, register: Any, value: Any) -> None:
        """Add a vector to an accumulator."""
        self.vectors.store(register, self.vectors.load(register) + value)

    def fold(self, registers: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
        """Combine all lanes of all accumulators; every lane of the result holds the total."""
        a, b, c, d = (self.vectors.load(register) for register in registers)
        total = self.vectors.keep(combine(combine(a, b), combine(c, d)))
        return fold_lanes(self.vectors, total, combine)
