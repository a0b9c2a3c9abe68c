"""Squares of lanes x lanes activations, transposed between tokens in memory and panels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..vectors import Vectors


def feature_columns(
    vectors: Vectors, tokens: Any, base_of: Callable[[int], Any], rest: int | None
) -> list[Any]:
    """Read some features of a vector of tokens; return a vector of tokens for each feature.

    Parameters
    ----------
    tokens : Buffer
        Flat, token by token.
    base_of : callable
        Tells where the features of the i-th token begin.
    rest : int or None
        How many features there are, when they are fewer than lanes; the others are zeros.
    """
    v = vectors

    def row(i: int) -> Any:
        if rest is None:
            return v.keep(v.load(tokens, base_of(i)))
        return v.keep(v.load_masked(tokens, base_of(i), rest))

    return v.transpose([row(i) for i in range(v.lanes)])


@contextmanager
def token_rows(vectors: Vectors, columns: Sequence[Any], tokens: Any) -> Iterator[tuple[Any, Any]]:
    """Loop over tokens; give the number of each, and the vector of its features.

    Parameters
    ----------
    columns : sequence of expr
        A vector of tokens for each feature, as many as lanes.
    tokens : expr
        How many there are from the first one on, perhaps more than lanes.
    """
    v = vectors
    rows = transposed(v, columns)
    with B.serial(0, T.min(T.Cast("int32", tokens), v.lanes)) as i:
        yield i, v.keep(v.load(rows, i * v.lanes))


def transposed(vectors: Vectors, rows: Sequence[Any]) -> Any:
    """Transpose a square of vectors; return a buffer of its own that holds the columns."""
    v = vectors
    scratch = B.alloc_buffer((v.lanes * v.lanes,), "float32", scope="global")
    for i, column in enumerate(v.transpose(rows)):
        v.store(scratch, column, i * v.lanes)
    return scratch
