"""Reading several small numbers at once, and keeping the loops around that short.

LLVM knows better ways to do each of these things, which are worse in the inner loops of sparse
kernels: they are bound by loads, and their loops are short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..vectors import Vectors


@contextmanager
def rolled_loop(count: Any, one: Any) -> Iterator[None]:
    """Run the body `count` times, in a loop that LLVM does not unroll.

    Unrolled by two, a short loop gains a branch for its odd step that nothing foresees. `one` is an
    int32 expression of that value which LLVM cannot see through.
    """
    left = B.alloc_buffer((1,), "int32", scope="global")
    B.buffer_store(left, T.Cast("int32", count), [0])
    with B.While(left[0] != 0):
        B.buffer_store(left, left[0] - one, [0])
        yield


class Position:
    """A running index into a long array.

    Indices that are counted up are cheaper than ones computed from a loop variable. They are of 32
    bits: longer ones TVM would place where a dead vector register was, and LLVM then keeps them in
    that vector register.
    """

    def __init__(self, start: Any) -> None:
        self._register = B.alloc_buffer((1,), "int32", scope="global")
        B.buffer_store(self._register, T.Cast("int32", start), [0])

    @property
    def now(self) -> Any:
        """Read it."""
        return self._register[0]

    def advance(self, steps: int) -> None:
        """Count it up."""
        B.buffer_store(self._register, self._register[0] + steps, [0])


class Spread:
    """Some consecutive floats, read as vectors of up to four, each to be spread over a register."""

    _PART = 4

    def __init__(self, vectors: Vectors, buffer: Any, at: Any, count: int) -> None:
        self.vectors = vectors
        self.parts = []
        for first in range(0, count, self._PART):
            part = Vectors(min(self._PART, count - first))
            if part.lanes == self._PART:
                # A plain load would be turned back into broadcasts from memory.
                raw = T.call_llvm_intrin(
                    "int8x16", "llvm.x86.sse3.ldu.dq", T.address_of(buffer[at + first])
                )
                self.parts.append((part.keep(T.reinterpret("float32x4", raw)), part.lanes))
            else:
                self.parts.append((part.keep(part.load(buffer, at + first)), part.lanes))

    def of(self, index: int) -> Any:
        """Return a vector whose lanes all hold number `index`."""
        part, held = self.parts[index // self._PART]
        if held == 1:
            return self.vectors.splat(part)
        # TVM wants no more lanes out of a shuffle than go in.
        lanes = self.vectors.lanes
        parts = [part] * -(-lanes // held)
        return self.vectors.keep(tirx.Shuffle(parts, [index % self._PART] * lanes))


class Fields:
    """Some consecutive uint16 numbers, read up to four at a time and taken apart by shifts.

    Left to itself, LLVM computes neighbouring addresses in a vector register and moves them back
    one by one, which costs more than the loads that it saves. Each load counts: between loads of
    512 bits, one of a general register takes a core's loads for nearly a whole cycle.
    """

    def __init__(self, buffer: Any, at: Any, count: int) -> None:
        self.words: list[tuple[Any, int]] = []
        first = 0
        while first < count:
            held = next(size for size in (4, 2, 1) if first + size <= count)
            bits = 16 * max(held, 2)
            word = B.alloc_buffer((1,), f"uint{bits}", scope="global")
            if held > 1:
                value = T.reinterpret(f"uint{bits}", buffer[B.ramp(at + first, 1, held)])
            else:
                value = T.Cast("uint32", buffer[at + first])
            B.buffer_store(word, value, [0])
            self.words += [(word, index) for index in range(held)]
            first += held

    def of(self, index: int) -> Any:
        """Return number `index` as int64."""
        word, place = self.words[index]
        kind = T.uint64 if str(word.dtype) == "uint64" else T.uint32
        number = T.shift_right(word[0], kind(16 * place)) if place else word[0]
        return T.Cast("int64", T.bitwise_and(number, kind(0xFFFF)))
