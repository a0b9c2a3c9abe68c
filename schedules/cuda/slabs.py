"""Results of tensor cores on their way from shared memory to y, in the order of its elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from .results import Results
from .tensor_tiles import TensorShape, summed_up
from .threads import Threads

RowOf = Callable[[Any], Any]


def store_token_rows(
    slab: Any,
    shape: TensorShape,
    threads: Threads,
    results: Results,
    row_of: RowOf,
    token: Any,
    tokens: Any,
) -> None:
    """Write a slab to y [tokens, rows], whose neighbours in memory are rows.

    Parameters
    ----------
    slab : Buffer
        Sums, see `TensorShape.slab_rows`.
    row_of : callable
        The matrix row of a row of the slab.
    token, tokens : PrimExpr
        The first token of the slab, and the number of all.
    """
    paired = shape.in_order and shape.rows % 2 == 0
    width = 2 if paired else 1
    across = shape.slab_rows // width
    with threads.share(across * shape.nt) as i:
        row, column = T.floormod(i, across) * width, T.floordiv(i, across)
        m, n = row_of(row), token + column
        with B.If(T.And(m < shape.rows, n < tokens)), B.Then():
            sums = summed_up(slab, shape, row, column, width)
            if paired:
                results.store_pair(sums, [m, m + 1], [n, m])
            else:
                results.store(sums[0], m, [n, m])


def store_feature_rows(
    slab: Any,
    shape: TensorShape,
    threads: Threads,
    results: Results,
    row_of: RowOf,
    columns: tuple[Any, Any],
    index: Callable[[Any, Any], Sequence[Any]],
    paired: bool,
) -> None:
    """Write a slab to y, whose neighbours in memory are columns.

    Parameters
    ----------
    columns : tuple of PrimExpr
        The first column of the slab, and the number of all.
    index : callable
        (row, column) -> index into y.
    paired : bool
        Whether an even column and the next are neighbours on y's last axis.
    """
    width = 2 if paired else 1
    across = shape.nt // width
    with threads.share(across * shape.slab_rows) as i:
        row, along = T.floordiv(i, across), T.floormod(i, across) * width
        m, n = row_of(row), columns[0] + along
        with B.If(T.And(m < shape.rows, n < columns[1])), B.Then():
            sums = summed_up(slab, shape, row, along, width)
            if paired:
                results.store_pair(sums, [m, m], index(m, n))
            else:
                results.store(sums[0], m, index(m, n))
