"""Matrix products of two activations, batched with broadcasting, as in attention."""

from __future__ import annotations

import math
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
    Tensor,
    UnsupportedShapeError,
    dense_kernel,
    outer_loop,
    product,
    static_product,
)

FLOPS_PER_MICROSECOND_AND_LANE = 6_000.0


@dataclass(frozen=True)
class Tile:
    """A register tile of rows x vectors; `masked` when the last vector passes the edge."""

    rows: int
    vectors: int
    masked: bool = False


def batch_matmul(
    a_shape: Sequence[Dim],
    b_shape: Sequence[Dim],
    machine: X86Machine,
    scale: float = 1.0,
) -> tirx.PrimFunc:
    """Build Y = scale * (A @ B) with NumPy's rules for the leading dimensions.

    Rows and columns that do not fill a tile are covered by a tile that overlaps its neighbour, so
    that only matrices smaller than one tile need masks.

    Parameters
    ----------
    a_shape, b_shape : sequence of int or str
        (..., M, K) and (..., K, N); names are symbolic dimensions.
    machine : X86Machine
        Gives vector width, registers and threads.
    scale : float
        Applied to the result.

    Returns
    -------
    PrimFunc
        Parameters (a, b, y), float32.

    Raises
    ------
    UnsupportedShapeError
        When the shapes do not fit each other, or have fewer than two dimensions.
    """
    batch = broadcast_batch(a_shape, b_shape)
    rows, depth, columns = a_shape[-2], a_shape[-1], b_shape[-1]
    result: list[Any] = []
    with dense_kernel("batch_matmul", result) as kernel:
        a, b = kernel.tensor("a", a_shape), kernel.tensor("b", b_shape)
        y = kernel.tensor("y", [*batch, rows, columns])
        macs = static_product([*batch, rows, depth, columns])
        cost = (
            None if macs is None else 2.0 * macs / (FLOPS_PER_MICROSECOND_AND_LANE * machine.lanes)
        )
        with kernel.body():
            emitter = _Emitter(machine, a, b, y, scale)
            with outer_loop(product(y.shape[:-2]), cost, machine.threads) as index:
                emitter.matrix(index, rows, columns)
    return result[0]


def broadcast_batch(a_shape: Sequence[Dim], b_shape: Sequence[Dim]) -> list[Dim]:
    """Give the leading dimensions of a product.

    Raises
    ------
    UnsupportedShapeError
        When the shapes do not fit each other, or have fewer than two dimensions.
    """
    if len(a_shape) < 2 or len(b_shape) < 2:
        raise UnsupportedShapeError("a product with a vector is left to TVM")
    if a_shape[-1] != b_shape[-2]:
        raise UnsupportedShapeError(f"{a_shape[-1]} columns do not meet {b_shape[-2]} rows")
    rank = max(len(a_shape), len(b_shape)) - 2
    batch: list[Dim] = []
    for left, right in zip(_lead(a_shape, rank), _lead(b_shape, rank), strict=True):
        if left != right and 1 not in (left, right):
            raise UnsupportedShapeError(f"batch dimensions {left} and {right} may differ")
        batch.append(right if left == 1 else left)
    return batch


def _lead(shape: Sequence[Dim], rank: int) -> list[Dim]:
    return [1] * (rank + 2 - len(shape)) + list(shape[:-2])


class _Emitter:
    def __init__(self, machine: X86Machine, a: Tensor, b: Tensor, y: Tensor, scale: float) -> None:
        self.machine = machine
        self.vectors = Vectors(machine.lanes)
        self.a, self.b, self.y = a, b, y
        self.scale = scale
        # Accumulators, one row of B, and one broadcast value fill the register file.
        self.most_vectors = 4 if machine.registers >= 32 else 2
        self.most_rows = (machine.registers - 2 - self.most_vectors) // self.most_vectors
        self.most_rows = min(self.most_rows, 6)

    def matrix(self, index: Any, rows: Dim, columns: Dim) -> None:
        """Emit one matrix of the batch."""
        self.a_base = self._batch_offset(self.a, index)
        self.b_base = self._batch_offset(self.b, index)
        self.y_base = index * (self.y.shape[-2] * self.y.shape[-1])
        if isinstance(columns, int):
            self._columns_static(rows, columns)
            return
        width = self.most_vectors * self.machine.lanes
        with B.If(self.y.shape[-1] >= width):
            with B.Then():
                self._columns_tiled(rows, self.most_vectors)
            with B.Else():
                with B.serial(0, T.ceildiv(self.y.shape[-1], T.int64(self.machine.lanes))) as j:
                    self._rows(rows, Tile(0, 1, masked=True), j * self.machine.lanes)

    def _columns_static(self, rows: Dim, columns: int) -> None:
        lanes = self.machine.lanes
        vectors = math.ceil(columns / lanes)
        width = math.ceil(vectors / math.ceil(vectors / self.most_vectors))
        if columns < width * lanes:
            self._rows(rows, Tile(0, width, masked=columns % lanes != 0), T.int64(0))
        else:
            self._columns_tiled(rows, width)

    def _columns_tiled(self, rows: Dim, vectors: int) -> None:
        width = vectors * self.machine.lanes
        columns = self.y.shape[-1]
        with B.serial(0, T.ceildiv(columns, T.int64(width))) as j:
            self._rows(rows, Tile(0, vectors), T.min(j * width, columns - width))

    def _rows(self, rows: Dim, tile: Tile, column: Any) -> None:
        most = self.most_rows
        if isinstance(rows, int):
            height = math.ceil(rows / math.ceil(rows / most))
            self._rows_tiled(Tile(height, tile.vectors, tile.masked), column)
            return
        with B.If(self.y.shape[-2] >= most):
            with B.Then():
                self._rows_tiled(Tile(most, tile.vectors, tile.masked), column)
            with B.Else():
                self._rows_tiled(Tile(1, tile.vectors, tile.masked), column)

    def _rows_tiled(self, tile: Tile, column: Any) -> None:
        rows = self.y.shape[-2]
        with B.serial(0, T.ceildiv(rows, T.int64(tile.rows))) as i:
            self._tile(tile, T.min(i * tile.rows, rows - tile.rows), column)

    def _tile(self, tile: Tile, row: Any, column: Any) -> None:
        vectors, lanes = self.vectors, self.machine.lanes
        depth, columns = self.a.shape[-1], self.b.shape[-1]
        tail = T.Cast("int32", columns - column - (tile.vectors - 1) * lanes)
        sums = [[vectors.register() for _ in range(tile.vectors)] for _ in range(tile.rows)]
        b_row = [vectors.register() for _ in range(tile.vectors)]
        for register in (register for row_sums in sums for register in row_sums):
            vectors.store(register, vectors.zero())
        with B.serial(0, depth) as k:
            for j in range(tile.vectors):
                at = self.b_base + k * columns + column + j * lanes
                last = tile.masked and j == tile.vectors - 1
                value = (
                    vectors.load_masked(self.b.flat, at, tail)
                    if last
                    else vectors.load(self.b.flat, at)
                )
                vectors.store(b_row[j], value)
            for r in range(tile.rows):
                factor = vectors.splat(self.a.flat[self.a_base + (row + r) * depth + k])
                for j in range(tile.vectors):
                    total = vectors.load(sums[r][j]) + factor * vectors.load(b_row[j])
                    vectors.store(sums[r][j], total)
        for r in range(tile.rows):
            for j in range(tile.vectors):
                value = vectors.load(sums[r][j])
                if self.scale != 1.0:
                    value = value * vectors.splat(T.float32(self.scale))
                at = self.y_base + (row + r) * columns + column + j * lanes
                if tile.masked and j == tile.vectors - 1:
                    vectors.store_masked(self.y.flat, value, at, tail)
                else:
                    vectors.store(self.y.flat, value, at)

    def _batch_offset(self, operand: Tensor, index: Any) -> Any:
        """Where the operand's matrix starts; broadcast dimensions do not move it."""
        lead = self.y.shape[:-2]
        own = [T.int64(1)] * (len(lead) + 2 - len(operand.shape)) + operand.shape[:-2]
        size = operand.shape[-2] * operand.shape[-1]
        if all(_same(a, b) for a, b in zip(own, lead, strict=True)):
            return index * size
        offset: Any = T.int64(0)
        stride = size
        for dim, extent in zip(reversed(own), reversed(lead), strict=True):
            if not _is_one(dim):
                offset = offset + T.floormod(index, extent) * stride
                stride = stride * dim
            index = T.floordiv(index, extent)
        return offset


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, tirx.IntImm) and isinstance(right, tirx.IntImm):
        return int(left.value) == int(right.value)
    return bool(left is right or getattr(left, "same_as", lambda _: False)(right))


def _is_one(dim: Any) -> bool:
    return isinstance(dim, tirx.IntImm) and int(dim.value) == 1
