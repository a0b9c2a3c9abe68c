"""How the kernel for a handful of tokens reads a weight, once and as a few streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...formats.n_of_m import groups_of_word
from ..vectors import Vectors

# Instructions that permute a vector by a vector of indices, by their lanes; of an index they read
# as many bits as name a lane.
PERMUTES: dict[int, str] = {8: "llvm.x86.avx2.permps", 16: "llvm.x86.avx512.permvar.sf.512"}

# Accumulators: [token][panel].
Sums = list[list[Any]]


class StreamedWeight(Protocol):
    """A weight in panels of one vector of rows."""

    def declare(self) -> None:
        """Declare its arrays as the function's arguments."""

    @property
    def streams(self) -> int:
        """Arrays that a panel is read from."""

    def multiply(self, sums: Sums, x: Any, first: Any) -> None:
        """Add to `sums` the products of the panels from `first` on with the tokens x [n][k]."""


@dataclass
class DenseStream:
    """The array of a `dense` weight of `k` columns."""

    vectors: Vectors
    panels: int
    k: int
    streams: int = 1

    def declare(self) -> None:
        """Declare the values."""
        length = self.panels * self.k * self.vectors.lanes
        self.values = B.arg("values", B.Buffer((length,), "float32"))

    def multiply(self, sums: Sums, x: Any, first: Any) -> None:
        """Spread one feature of every token, column by column."""
        v = self.vectors
        with B.serial(0, self.k) as k:
            weights = [
                v.keep(v.load(self.values, ((first + p) * self.k + k) * v.lanes))
                for p in range(len(sums[0]))
            ]
            for token, row in enumerate(sums):
                scalar = v.splat(x[token * self.k + k])
                for weight, register in zip(weights, row, strict=True):
                    v.store(register, v.load(register) + weight * scalar)


@dataclass
class NOfMStream:
    """The arrays of an `n_of_m` weight of `k` columns.

    A slot's codes permute the activations of its group, which is repeated as often as it fits into
    a vector: what a code's neighbours leave in an index above its own bits does not matter.
    """

    vectors: Vectors
    panels: int
    k: int
    n: int
    m: int
    streams: int = 2

    @property
    def _bits(self) -> int:
        return self.m.bit_length() - 1

    @property
    def _each(self) -> int:
        return groups_of_word(self.n, self.m)

    @property
    def _words(self) -> int:
        return -(-self.k // (self.m * self._each))

    def declare(self) -> None:
        """Declare the codes and the values."""
        codes = self.panels * self._words * self.vectors.lanes
        self.codes = B.arg("codes", B.Buffer((codes,), "int32"))
        values = codes * self._each * self.n
        self.values = B.arg("values", B.Buffer((values,), "float32"))

    def multiply(self, sums: Sums, x: Any, first: Any) -> None:
        """Go through the words, and in the last one through the groups that there are."""
        groups, rest = divmod(self.k, self.m)
        whole, left = divmod(groups, self._each)
        lanes = self.vectors.lanes
        codes = [B.alloc_buffer((lanes,), "int32", scope="global") for _ in sums[0]]
        with B.serial(0, whole) as word:
            self._read_codes(codes, first, word)
            with B.serial(0, self._each) as group:
                self._group(sums, x, codes, first, word, group, self.m)
        if left or rest:
            self._read_codes(codes, first, whole)
            with B.serial(0, left) as group:
                self._group(sums, x, codes, first, whole, group, self.m)
            if rest:
                self._group(sums, x, codes, first, whole, left, rest)

    def _read_codes(self, codes: list[Any], first: Any, word: Any) -> None:
        v = self.vectors
        for p, register in enumerate(codes):
            v.store(register, v.load(self.codes, ((first + p) * self._words + word) * v.lanes))

    def _group(
        self, sums: Sums, x: Any, codes: list[Any], first: Any, word: Any, group: Any, count: int
    ) -> None:
        """Multiply one group, of which `count` columns exist, and drop its codes."""
        v = self.vectors
        column = (word * self._each + group) * self.m
        tokens = [self._repeated(x, token * self.k + column, count) for token in range(len(sums))]
        for p, register in enumerate(codes):
            slot = (((first + p) * self._words + word) * self._each + group) * self.n
            for i in range(self.n):
                weight = v.keep(v.load(self.values, (slot + i) * v.lanes))
                index = v.load(register)
                for token, row in enumerate(sums):
                    picked = T.call_llvm_intrin(
                        f"float32x{v.lanes}", PERMUTES[v.lanes], v.load(tokens[token]), index
                    )
                    v.store(row[p], v.load(row[p]) + weight * picked)
                v.store(register, T.shift_right(index, v.splat(T.int32(self._bits))))

    def _repeated(self, x: Any, at: Any, count: int) -> Any:
        """Hold a group's activations in a register, again and again; zeros where there are none."""
        narrow, v = Vectors(self.m), self.vectors
        held = narrow.load(x, at) if count == self.m else narrow.load_masked(x, at, T.int32(count))
        register = v.register()
        v.store(register, tirx.Shuffle([held] * (v.lanes // self.m), list(range(v.lanes))))
        return register
