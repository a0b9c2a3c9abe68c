"""Sums, means, maxima and minima over the last axes; a mean over an image is global pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import (
    Dim,
    UnsupportedShapeError,
    dense_kernel,
    maximum,
    minimum,
    outer_loop,
    product,
    static_product,
)
from .rows import Row

ReduceKind = Literal["sum", "mean", "max", "min"]

_START: dict[str, float] = {
    "sum": 0.0,
    "mean": 0.0,
    "max": float("-inf"),
    "min": float("inf"),
}
_NANOSECONDS_PER_VECTOR = 0.6


def reduce_last(
    shape: Sequence[Dim],
    axes: int,
    out_shape: Sequence[Dim],
    machine: X86Machine,
    kind: ReduceKind = "mean",
) -> tirx.PrimFunc:
    """Build a reduction over the last `axes` axes.

    Parameters
    ----------
    shape : sequence of int or str
        Shape of `x`.
    axes : int
        How many last axes are reduced.
    out_shape : sequence of int or str
        Shape of the result: the other axes, and ones if reduced axes are kept.
    machine : X86Machine
        Gives vector width and threads.
    kind : {"sum", "mean", "max", "min"}
        Maxima and minima keep NaN.

    Returns
    -------
    PrimFunc
        Parameters (x, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When no axis is reduced, a dimension is 0, or more than one reduced axis is symbolic.
    """
    inner = list(shape[len(shape) - axes :])
    if not axes:
        raise UnsupportedShapeError("no axis is reduced")
    length = static_product(inner)
    if length is None and len(inner) > 1:
        raise UnsupportedShapeError("several reduced axes of unknown size are left to TVM")
    result: list[Any] = []
    with dense_kernel(f"{kind}_last", result) as kernel:
        x, y = kernel.tensor("x", shape), kernel.tensor("y", out_shape)
        elements = static_product(shape)
        cost = None
        if elements is not None:
            cost = elements / machine.lanes * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body():
            rows = product(x.shape[: len(shape) - axes])
            with outer_loop(rows, cost, machine.threads) as number:
                size = product(x.shape[len(shape) - axes :])
                row = Row(Vectors(machine.lanes), size, inner[0] if length is None else length)
                total = _reduce(row, x.flat, number * size, kind)
                if kind == "mean":
                    total = total / row.vectors.splat(T.Cast("float32", size))
                    total = row.vectors.keep(total)
                B.buffer_store(y.flat, tirx.Shuffle([total], [0]), [number])
    return result[0]


def _reduce(row: Row, flat: Any, base: Any, kind: str) -> Any:
    lanes, vectors = row.vectors.lanes, row.vectors

    def combine(a: Any, b: Any) -> Any:
        if kind == "max":
            return maximum(a, b, lanes)
        return minimum(a, b, lanes) if kind == "min" else a + b

    totals = row.accumulators(_START[kind])

    def visit(slot: int, offset: Any, count: Any) -> None:
        value = row.load(flat, base + offset, count, _START[kind])
        vectors.store(totals[slot], combine(vectors.load(totals[slot]), value))

    row.walk(visit)
    return row.fold(totals, combine)
