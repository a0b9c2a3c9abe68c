"""Vector code in TensorIR's builder: registers, loads, stores, masked tails, transposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B


class Vectors:
    """Emits float32 vector code of one width, one element being the narrowest, into a function.

    A register is a buffer of one vector in scope "global" and under 1 KiB: TVM turns that into a
    stack slot, which LLVM promotes to a machine register. Wider or otherwise scoped buffers end up
    on the heap.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def register(self) -> Any:
        """Reserve one vector register."""
        return B.alloc_buffer((self.lanes,), "float32", scope="global")

    def load(self, buffer: Any, base: Any = 0) -> Any:
        """Read `lanes` consecutive elements of a flat buffer."""
        return buffer[self._lanes_from(base)]

    def store(self, buffer: Any, value: Any, base: Any = 0) -> None:
        """Write `lanes` consecutive elements of a flat buffer."""
        B.buffer_store(buffer, value, [self._lanes_from(base)])

    def _lanes_from(self, base: Any) -> Any:
        return B.ramp(base, 1, self.lanes) if self.lanes > 1 else base

    def splat(self, scalar: Any) -> Any:
        """Repeat a scalar in every lane."""
        return B.broadcast(scalar, self.lanes) if self.lanes > 1 else scalar

    def zero(self) -> Any:
        """Return a vector of zeros."""
        return self.splat(T.float32(0))

    def keep(self, value: Any) -> Any:
        """Compute a value once, and return a cheap read of it."""
        register = self.register()
        self.store(register, value)
        return self.load(register)

    def mask(self, count: Any) -> Any:
        """Lanes whose number is below `count` (an int32 expression, which may be negative)."""
        return B.ramp(T.int32(0), T.int32(1), self.lanes) < self.splat(count)

    def load_masked(self, buffer: Any, base: Any, count: Any) -> Any:
        """Read the first `count` lanes, zeros behind; nothing else is touched."""
        return T.call_llvm_intrin(
            f"float32x{self.lanes}",
            "llvm.masked.load",
            T.address_of(buffer[base]),
            self.mask(count),
            self.zero(),
        )

    def store_masked(self, buffer: Any, value: Any, base: Any, count: Any) -> None:
        """Write the first `count` lanes; nothing else is touched."""
        B.evaluate(
            T.call_llvm_intrin(
                "void",
                "llvm.masked.store",
                value,
                T.address_of(buffer[base]),
                self.mask(count),
            )
        )

    def transpose(self, rows: Sequence[Any]) -> list[Any]:
        """Transpose a square of `lanes` vectors in registers.

        Each of log2(lanes) rounds exchanges the off-diagonal halves of blocks (Eklundh, 1972); LLVM
        turns the shuffles into unpack and permute instructions.
        """
        current, block = list(rows), 1
        while block < self.lanes:
            current = [self._exchange(current, row, block) for row in range(self.lanes)]
            block *= 2
        return current

    def _exchange(self, rows: Sequence[Any], row: int, block: int) -> Any:
        lower, upper = row & ~block, row | block
        if row & block:
            picks = [k + block if not k & block else self.lanes + k for k in range(self.lanes)]
        else:
            picks = [k if not k & block else self.lanes + k - block for k in range(self.lanes)]
        return self.keep(tirx.Shuffle([rows[lower], rows[upper]], picks))
