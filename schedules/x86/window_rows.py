"""Sliding windows along a row of an image: which vectors touch the border, and their loads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..vectors import Vectors

# Called with the first output vector (an expression) and the numbers of the group's vectors.
# A number counts from the row's begin; in the loop over inner groups, from the group's begin.
Group = Callable[[Any, list[int]], None]


def valid_taps(
    row: Any, height: int, taps: int, stride: int, dilation: int, top: int
) -> tuple[Any, Any, Any]:
    """Give the half-open range of taps that fall inside, and the input row of tap 0."""
    first = row * stride - top
    begin: Any = T.int64(0)
    end: Any = T.int64(taps)
    if top > 0:
        begin = T.max(begin, T.floordiv(T.int64(dilation - 1) - first, T.int64(dilation)))
    end = T.min(end, T.floordiv(T.int64(height + dilation - 1) - first, T.int64(dilation)))
    return begin, end, first


class WindowRow:
    """Loads of the taps of a window that slides along a row, for vectors of neighbouring outputs.

    Parameters
    ----------
    vectors : Vectors
        Emits the loads.
    width, out_width : int
        Elements of the input and the output row.
    taps, stride, dilation, left : int
        The window: elements, step, distance of its elements, padding before the row.
    most : int
        Vectors that one group may hold in registers.
    padding : float
        What stands outside the row.
    """

    def __init__(
        self,
        vectors: Vectors,
        *,
        width: int,
        out_width: int,
        taps: int,
        stride: int,
        dilation: int,
        left: int,
        most: int,
        padding: float = 0.0,
    ) -> None:
        self.vectors = vectors
        self.width, self.out_width = width, out_width
        self.taps, self.stride, self.dilation, self.left = taps, stride, dilation, left
        self.most = most
        self.padding = padding
        self.count = math.ceil(out_width / vectors.lanes)
        inner = [number for number in range(self.count) if self._is_inner(number)]
        # Inner vectors are neighbours: only the borders interrupt them.
        self.inner = range(inner[0], inner[-1] + 1) if inner else range(0)

    def _is_inner(self, number: int) -> bool:
        """Whether neither a load nor the store of a vector passes a border."""
        lanes = self.vectors.lanes
        first = number * lanes * self.stride - self.left
        last = first + (self.taps - 1) * self.dilation + lanes * self.stride
        return first >= 0 and last + 1 <= self.width and (number + 1) * lanes <= self.out_width

    def groups(self, emit: Group) -> None:
        """Emit all groups of the row: all at once, or border, loop over the inside, border."""
        zero = T.int64(0)
        whole = len(self.inner) // self.most
        if self.count <= self.most or whole < 2:
            for numbers in _split(range(self.count), self.most):
                emit(zero, numbers)
            return
        for numbers in _split(range(self.inner.start), self.most):
            emit(zero, numbers)
        with B.serial(0, T.int64(whole)) as i:
            emit(T.int64(self.inner.start) + i * self.most, list(range(self.most)))
        behind = self.inner.start + whole * self.most
        for numbers in _split(range(behind, self.count), self.most):
            emit(zero, numbers)

    def loads(self, flat: Any, row: Any, first: Any, number: int) -> Iterator[tuple[int, Any]]:
        """Yield (tap, its vector); taps that lie outside for all lanes are left out.

        `row` is where the input row begins; `first` is not 0 only in the loop over the inside.
        """
        inside = not _is_zero(first)
        pairs: dict[int, tuple[Any, Any]] = {}
        for tap in range(self.taps):
            offset = tap * self.dilation - self.left
            if self.stride == 1:
                if inside or self._touches(number * self.vectors.lanes + offset):
                    yield tap, self._load(flat, row, first, number, offset, inside)
                continue
            even = offset - offset % 2
            if even not in pairs:
                lanes = self.vectors.lanes
                pairs[even] = (
                    self.vectors.keep(self._load(flat, row, first, number, even, inside)),
                    self.vectors.keep(self._load(flat, row, first, number, even + lanes, inside)),
                )
            lanes = self.vectors.lanes
            picks = [2 * lane + offset % 2 for lane in range(lanes)]
            yield tap, tirx.Shuffle(list(pairs[even]), picks)

    def _touches(self, start: int) -> bool:
        return start < self.width and start + self.vectors.lanes > 0

    def _load(self, flat: Any, row: Any, first: Any, number: int, offset: int, inside: bool) -> Any:
        lanes = self.vectors.lanes
        start = number * lanes * self.stride + offset
        if inside:
            return self.vectors.load(flat, row + first * (lanes * self.stride) + start)
        low, high = max(0, -start), min(lanes, self.width - start)
        if low >= high:
            return self.vectors.splat(T.float32(self.padding))
        if low == 0 and high == lanes:
            return self.vectors.load(flat, row + start)
        mask = self._between(low, high)
        return T.call_llvm_intrin(
            f"float32x{lanes}",
            "llvm.masked.load",
            T.address_of(flat[row + start]),
            mask,
            self.vectors.splat(T.float32(self.padding)),
        )

    def _between(self, low: int, high: int) -> Any:
        lane = B.ramp(T.int32(0), T.int32(1), self.vectors.lanes)
        mask = lane < self.vectors.splat(T.int32(high))
        if low > 0:
            mask = T.And(mask, lane >= self.vectors.splat(T.int32(low)))
        return mask

    def valid_counts(self, first: Any, number: int) -> Any:
        """Count, for each output of a vector, the taps inside the row: a vector of floats."""
        lanes, one = self.vectors.lanes, self.vectors.splat(T.float32(1))
        if number in self.inner or not _is_zero(first):
            return self.vectors.splat(T.float32(self.taps))
        total = self.vectors.zero()
        for tap in range(self.taps):
            start = number * lanes * self.stride + tap * self.dilation - self.left
            low = math.ceil(max(0, -start) / self.stride)
            high = min(lanes, max(0, math.ceil((self.width - start) / self.stride)))
            if high > low:
                total = total + T.Select(self._between(low, high), one, self.vectors.zero())
        return total

    def load_out(self, flat: Any, row: Any, first: Any, number: int) -> Any:
        """Read the output's place from a tensor of the output's shape."""
        start, valid = self._out(first, number)
        if valid is None:
            return self.vectors.load(flat, row + start)
        return self.vectors.load_masked(flat, row + start, T.int32(valid))

    def store_out(self, flat: Any, value: Any, row: Any, first: Any, number: int) -> None:
        """Write an output vector."""
        start, valid = self._out(first, number)
        if valid is None:
            self.vectors.store(flat, value, row + start)
        else:
            self.vectors.store_masked(flat, value, row + start, T.int32(valid))

    def _out(self, first: Any, number: int) -> tuple[Any, int | None]:
        lanes = self.vectors.lanes
        valid = self.out_width - number * lanes
        start = first * lanes + number * lanes
        return start, None if valid >= lanes or not _is_zero(first) else valid


def _is_zero(expr: Any) -> bool:
    return isinstance(expr, tirx.IntImm) and int(expr.value) == 0


def _split(numbers: range, most: int) -> list[list[int]]:
    """Cut into groups of nearly equal size."""
    groups = math.ceil(len(numbers) / most)
    cuts = [len(numbers) * i // groups for i in range(groups + 1)] if groups else [0]
    return [list(numbers[a:b]) for a, b in itertools.pairwise(cuts)]
