"""Nearest neighbours of images that grow by whole factors: whole vectors, each row read once."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...targets import X86Machine
from ..vectors import Vectors
from .dense_kernel import Dim, UnsupportedShapeError, dense_kernel, outer_loop, static_product

_NANOSECONDS_PER_VECTOR = 0.5
# Narrower rows are not worth their shuffles.
_FEWEST_LANES = 4


def upsample_nearest(
    batch: Dim,
    channels: Dim,
    height: int,
    width: int,
    factors: tuple[int, int],
    machine: X86Machine,
) -> tirx.PrimFunc:
    """Build an upsampling that repeats every pixel.

    Parameters
    ----------
    batch, channels : int or str
        A name when symbolic.
    height, width : int
        The rest of the shape of `x`.
    factors : tuple of int
        How often a pixel is repeated down and along the row.
    machine : X86Machine
        Gives vector width and threads.

    Returns
    -------
    PrimFunc
        Parameters (x [n, c, h, w], y [n, c, h * down, w * along]), float32.

    Raises
    ------
    UnsupportedShapeError
        When rows are narrower than the narrowest vector.
    """
    if width < _FEWEST_LANES:
        raise UnsupportedShapeError(f"rows of {width} pixels are left to TVM")
    lanes = machine.lanes
    while lanes > width:
        lanes //= 2
    down, along = factors
    shape = (batch, channels, height * down, width * along)
    result: list[Any] = []
    with dense_kernel("upsample_nearest", result) as kernel:
        x = kernel.tensor("x", (batch, channels, height, width))
        y = kernel.tensor("y", shape)
        elements = static_product(shape)
        cost = None if elements is None else elements / lanes * _NANOSECONDS_PER_VECTOR / 1e3
        with kernel.body(), outer_loop(y.shape[0] * y.shape[1], cost, machine.threads) as plane:
            with B.serial(0, T.int64(height)) as row:
                _repeat_row(Vectors(lanes), x, y, plane * height + row, width, factors)
    return result[0]


def _repeat_row(
    vectors: Vectors, x: Any, y: Any, row: Any, width: int, factors: tuple[int, int]
) -> None:
    """Read a row's vectors, and store what each becomes into all rows of the result."""
    down, along = factors
    lanes = vectors.lanes
    with B.serial(0, T.int64(-(-width // lanes))) as number:
        # The last vector overlaps its neighbour instead of passing the edge.
        first = T.min(number * lanes, T.int64(width - lanes))
        pixels = vectors.keep(vectors.load(x.flat, row * width + first))
        for part in range(along):
            order = [(part * lanes + lane) // along for lane in range(lanes)]
            repeated = vectors.keep(tirx.Shuffle([pixels], order))
            for copy in range(down):
                base = (row * down + copy) * (width * along)
                vectors.store(y.flat, repeated, base + first * along + part * lanes)
