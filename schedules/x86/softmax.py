"""Softmax and log-softmax over the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tvm import tirx
from tvm.script import tirx as T

from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import Dim, dense_kernel, outer_loop, product, static_product
from .rows import Row
from .vector_math import exp_nonpositive

_NANOSECONDS_PER_VECTOR = 4.0


def softmax(
    shape: Sequence[Dim],
    machine: X86Machine,
    kind: Literal["softmax", "log_softmax"] = "softmax",
    scale: float = 1.0,
) -> tirx.PrimFunc:
    """Build softmax(scale * x) over the last axis.

    Parameters
    ----------
    shape : sequence of int or str
        Shape of `x` and of the result; names are symbolic dimensions.
    machine : X86Machine
        Gives vector width and threads.
    kind : {"softmax", "log_softmax"}
        Which of the two.
    scale : float
        Positive factor applied to `x` first.

    Returns
    -------
    PrimFunc
        Parameters (x, y), float32. A row that holds NaN or +inf becomes NaN, as in NumPy.

    Raises
    ------
    UnsupportedShapeError
        When a dimension is 0.
    """
    result: list[Any] = []
    lanes = machine.lanes
    with dense_kernel(kind, result) as kernel:
        x, y = kernel.tensor("x", shape), kernel.tensor("y", shape)
        elements = static_product(shape)
        cost = None if elements is None else elements / lanes * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body():
            with outer_loop(product(x.shape[:-1]), cost, machine.threads) as number:
                _row(Vectors(lanes), x, y, number, shape[-1], kind, scale)
    return result[0]


def _row(
    vectors: Vectors, x: Any, y: Any, number: Any, length: Dim, kind: str, scale: float
) -> None:
    row = Row(vectors, x.shape[-1], length)
    base = number * x.shape[-1]
    top = _maximum(row, x.flat, base)

    def shifted(offset: Any, count: Any) -> Any:
        difference = row.load(x.flat, base + offset, count, padding=float("-inf")) - top
        return difference * vectors.splat(T.float32(scale)) if scale != 1.0 else difference

    totals = row.accumulators(0.0)

    def exponential(slot: int, offset: Any, count: Any) -> None:
        value = vectors.keep(exp_nonpositive(shifted(offset, count), vectors.lanes))
        row.add_to(totals[slot], value)
        if kind == "softmax":
            row.store(y.flat, value, base + offset, count)

    row.walk(exponential)
    total = row.fold(totals, lambda a, b: a + b)
    if kind == "softmax":
        factor = vectors.keep(vectors.splat(T.float32(1.0)) / total)
        row.walk(
            lambda _, offset, count: row.store(
                y.flat, row.load(y.flat, base + offset, count) * factor, base + offset, count
            )
        )
    else:
        logarithm = vectors.keep(vectors.splat(T.log(tirx.Shuffle([total], [0]))))
        row.walk(
            lambda _, offset, count: row.store(
                y.flat, shifted(offset, count) - logarithm, base + offset, count
            )
        )


def _maximum(row: Row, flat: Any, base: Any) -> Any:
    tops = row.accumulators(float("-inf"))

    def visit(slot: int, offset: Any, count: Any) -> None:
        value = row.load(flat, base + offset, count, padding=float("-inf"))
        row.vectors.store(tops[slot], T.Max(row.vectors.load(tops[slot]), value))

    row.walk(visit)
    return row.fold(tops, lambda a, b: T.Max(a, b))
