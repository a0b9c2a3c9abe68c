"""Layer normalisation and root-mean-square normalisation over the last axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tvm import tirx
from tvm.script import tirx as T

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

_NANOSECONDS_PER_VECTOR = 1.5


def layer_norm(
    shape: Sequence[Dim],
    axes: int,
    machine: X86Machine,
    epsilon: float = 1e-5,
    kind: Literal["layer_norm", "rms_norm"] = "layer_norm",
    gamma: bool = True,
    beta: bool = True,
) -> tirx.PrimFunc:
    """Build (x - mean) / sqrt(variance + epsilon) * gamma + beta over the last `axes` axes.

    The variance is the mean square of the differences from the mean, in a second pass: the
    difference of two large sums would lose everything when the mean is large.

    Parameters
    ----------
    shape : sequence of int or str
        Shape of `x` and of the result; the normalised axes must be numbers.
    axes : int
        How many last axes are normalised.
    machine : X86Machine
        Gives vector width and threads.
    epsilon : float
        Added to the variance.
    kind : {"layer_norm", "rms_norm"}
        "rms_norm" subtracts no mean, and divides by the root of the mean square.
    gamma, beta : bool
        Whether there is a factor and a summand, each of the shape of the normalised axes.

    Returns
    -------
    PrimFunc
        Parameters (x, gamma if any, beta if any, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When a normalised axis is symbolic, or a dimension is 0.
    """
    length = static_product(shape[len(shape) - axes :])
    if not axes or length is None:
        raise UnsupportedShapeError(f"{kind} needs normalised axes of known size")
    result: list[Any] = []
    with dense_kernel(kind, result) as kernel:
        x = kernel.tensor("x", shape)
        inner = shape[len(shape) - axes :]
        scale = kernel.tensor("gamma", inner) if gamma else None
        shift = kernel.tensor("beta", inner) if beta else None
        y = kernel.tensor("y", shape)
        elements = static_product(shape)
        vectors = None if elements is None else elements / machine.lanes
        cost = None if vectors is None else vectors * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body():
            rows = product(x.shape[: len(shape) - axes])
            with outer_loop(rows, cost, machine.threads) as number:
                _row(Vectors(machine.lanes), x, scale, shift, y, number, length, epsilon, kind)
    return result[0]


def _row(
    vectors: Vectors,
    x: Any,
    scale: Any,
    shift: Any,
    y: Any,
    number: Any,
    length: int,
    epsilon: float,
    kind: str,
) -> None:
    row = Row(vectors, T.int64(length), length)
    base = number * length
    share = vectors.splat(T.float32(1.0 / length))
    mean = _mean(row, x.flat, base, share) if kind == "layer_norm" else None
    squares = row.accumulators(0.0)

    def square(slot: int, offset: Any, count: Any) -> None:
        value = row.load(x.flat, base + offset, count)
        difference = vectors.keep(value if mean is None else value - mean)
        product = difference * difference
        if mean is not None and count is not None:
            # Lanes behind the end hold -mean, not 0.
            product = T.Select(vectors.mask(count), product, vectors.zero())
        row.add_to(squares[slot], product)

    row.walk(square)
    variance = row.fold(squares, lambda a, b: a + b) * share
    root = T.sqrt(variance + vectors.splat(T.float32(epsilon)))
    factor = vectors.keep(vectors.splat(T.float32(1.0)) / root)

    def write(_: int, offset: Any, count: Any) -> None:
        value = row.load(x.flat, base + offset, count)
        value = (value if mean is None else value - mean) * factor
        if scale is not None:
            value = value * row.load(scale.flat, offset, count)
        if shift is not None:
            value = value + row.load(shift.flat, offset, count)
        row.store(y.flat, value, base + offset, count)

    row.walk(write)


def _mean(row: Row, flat: Any, base: Any, share: Any) -> Any:
    sums = row.accumulators(0.0)

    def visit(slot: int, offset: Any, count: Any) -> None:
        row.add_to(sums[slot], row.load(flat, base + offset, count))

    row.walk(visit)
    return row.vectors.keep(row.fold(sums, lambda a, b: a + b) * share)
