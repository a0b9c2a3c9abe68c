"""Permutations of axes: rows are copied where the last axis stays, squares transposed where not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import (
    Dim,
    UnsupportedShapeError,
    dense_kernel,
    outer_loop,
    product,
    static_product,
)
from .rows import Row

_NANOSECONDS_PER_ELEMENT = 0.15
# Narrower squares are not worth their shuffles.
_SMALLEST_SQUARE = 4


@dataclass(frozen=True)
class Axis:
    """An axis of the result: its extent, as a number where known, and its step in the input."""

    extent: Any
    known: int | None
    step: Any


def permute_dims(
    shape: Sequence[Dim], axes: Sequence[int], out_shape: Sequence[Dim], machine: X86Machine
) -> tirx.PrimFunc:
    """Build a permutation of axes.

    Parameters
    ----------
    shape : sequence of int or str
        Shape of `x`.
    axes : sequence of int
        Axis k of the result is axis `axes[k]` of `x`.
    out_shape : sequence of int or str
        Shape of the result.
    machine : X86Machine
        Gives vector width and threads.

    Returns
    -------
    PrimFunc
        Parameters (x, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When `axes` is no permutation, or a dimension is 0.
    """
    if sorted(axes) != list(range(len(shape))):
        raise UnsupportedShapeError(f"{list(axes)} is no permutation of {len(shape)} axes")
    result: list[Any] = []
    with dense_kernel("permute_dims", result) as kernel:
        x, y = kernel.tensor("x", shape), kernel.tensor("y", out_shape)
        elements = static_product(shape)
        cost = None if elements is None else elements * _NANOSECONDS_PER_ELEMENT / 1e3
        with kernel.body():
            _Emitter(machine, x, y, cost).emit(_merged(shape, x.shape, axes))
    return result[0]


def _merged(shape: Sequence[Dim], extents: Sequence[Any], axes: Sequence[int]) -> list[Axis]:
    """Give the result's axes, those left out that have one element, neighbours joined."""
    steps = [product(extents[axis + 1 :]) for axis in range(len(shape))]
    kept = [axis for axis in axes if shape[axis] != 1]
    order = [axis for axis in range(len(shape)) if shape[axis] != 1]
    follows = dict(itertools.pairwise(order))
    groups: list[list[int]] = []
    for axis in kept:
        if groups and follows.get(groups[-1][-1]) == axis:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return [
        Axis(
            product([extents[axis] for axis in group]),
            static_product([shape[axis] for axis in group]),
            steps[group[-1]],
        )
        for group in groups
    ] or [Axis(T.int64(1), 1, T.int64(1))]


class _Emitter:
    def __init__(self, machine: X86Machine, x: Any, y: Any, cost: float | None) -> None:
        self.machine, self.x, self.y, self.cost = machine, x, y, cost

    def emit(self, axes: list[Axis]) -> None:
        """Emit the whole permutation."""
        last = axes[-1]
        if _is_one(last.step):
            self._copy_rows(axes)
            return
        inner = next(i for i, axis in enumerate(axes) if _is_one(axis.step))
        lanes = self.machine.lanes
        while lanes > _SMALLEST_SQUARE and any(
            axis.known is not None and axis.known < lanes for axis in (last, axes[inner])
        ):
            lanes //= 2
        with self._outer([a for i, a in enumerate(axes[:-1]) if i != inner]) as index:
            others = [i for i in range(len(axes) - 1) if i != inner]
            source, target = self._offsets(axes, others, index)
            self._plane(axes[inner], last, product([a.extent for a in axes[inner + 1 :]]),
                        source, target, lanes)  # fmt: skip

    def _outer(self, axes: Sequence[Axis]) -> Any:
        return outer_loop(product([a.extent for a in axes]), self.cost, self.machine.threads)

    def _offsets(self, axes: list[Axis], numbers: list[int], index: Any) -> tuple[Any, Any]:
        """Where the `index`-th combination of the numbered axes starts in input and output."""
        source: Any = T.int64(0)
        target: Any = T.int64(0)
        for number in reversed(numbers):
            position = T.floormod(index, axes[number].extent) if number != numbers[0] else index
            index = T.floordiv(index, axes[number].extent)
            source = source + position * axes[number].step
            target = target + position * product([a.extent for a in axes[number + 1 :]])
        return source, target

    def _copy_rows(self, axes: list[Axis]) -> None:
        last, outer = axes[-1], list(range(len(axes) - 1))
        with self._outer(axes[:-1]) as index:
            source, target = self._offsets(axes, outer, index)
            length: Dim = "length" if last.known is None else last.known
            row = Row(Vectors(self.machine.lanes), last.extent, length)
            row.walk(
                lambda _, offset, count: row.store(
                    self.y.flat, row.load(self.x.flat, source + offset, count),
                    target + offset, count,
                )
            )  # fmt: skip

    def _plane(
        self, down: Axis, across: Axis, down_out: Any, source: Any, target: Any, lanes: int
    ) -> None:
        """Swap two axes: `down` is contiguous in the input, `across` in the output."""
        narrow = any(a.known is not None and a.known < lanes for a in (down, across))
        symbolic = down.known is None or across.known is None

        def scalar() -> None:
            with B.serial(0, down.extent) as i, B.serial(0, across.extent) as j:
                B.buffer_store(
                    self.y.flat, self.x.flat[source + i + j * across.step],
                    [target + i * down_out + j],
                )  # fmt: skip

        if narrow:
            scalar()
            return
        if not symbolic:
            self._squares(down, across, down_out, source, target, lanes)
            return
        with B.If(T.And(down.extent >= lanes, across.extent >= lanes)):
            with B.Then():
                self._squares(down, across, down_out, source, target, lanes)
            with B.Else():
                scalar()

    def _squares(
        self, down: Axis, across: Axis, down_out: Any, source: Any, target: Any, lanes: int
    ) -> None:
        vectors = Vectors(lanes)
        width = T.int64(lanes)
        with B.serial(0, T.ceildiv(down.extent, width)) as i:
            with B.serial(0, T.ceildiv(across.extent, width)) as j:
                # The last square overlaps its neighbour instead of passing the edge.
                top = T.min(i * width, down.extent - width)
                left = T.min(j * width, across.extent - width)
                rows = [
                    vectors.keep(vectors.load(self.x.flat, source + top + (left + r) * across.step))
                    for r in range(lanes)
                ]
                for r, column in enumerate(vectors.transpose(rows)):
                    vectors.store(self.y.flat, column, target + (top + r) * down_out + left)


def _is_one(expr: Any) -> bool:
    return isinstance(expr, tirx.IntImm) and int(expr.value) == 1
