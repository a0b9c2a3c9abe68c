"""Unstructured sparse products on CUDA cores: gathers from shared memory, sums in registers.

A block of threads computes a tile of rows for a tile of columns (tokens, or pixels of an image).
Block by block of the weight's columns, it brings the activations that belong to them and the
weight's nonzeros to shared memory; then each warp walks the nonzeros of its rows, every lane
summing up some columns. A convolution is computed directly: its columns are offsets into the
window of the padded input that the pixels of the tile see (X. Chen, "Escoin: Efficient Sparse
Convolutional Neural Network Inference on GPUs", arXiv 1802.10280, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from .threads import Threads, barrier, kept, launch, local, shared


@dataclass(frozen=True)
class TileShape:
    """What a thread block computes.

    Attributes
    ----------
    rows, columns : int
        Of the weight.
    mt, kb, step, most : int
        Of the packed format `row_tiles`.
    warps : int
        Warps a block; `mt` is a multiple of it.
    nt : int
        Columns of activations that a lane sums up.
    at_once : int
        Blocks of threads that a multiprocessor shall hold.
    """

    rows: int
    columns: int
    mt: int
    kb: int
    step: int
    most: int
    warps: int
    nt: int
    at_once: int = 1

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.rows // self.mt)

    @property
    def blocks(self) -> int:
        """Blocks of the weight's columns."""
        return -(-self.columns // self.kb)

    @property
    def width(self) -> int:
        """Columns of activations of a thread block."""
        return 32 * self.nt


class TileIO(Protocol):
    """How a tile reads activations and writes results; it keeps the buffers that it declares."""

    @property
    def shared_floats(self) -> int:
        """Floats of shared memory that `stage` and `store` use, one after the other."""
        ...

    @property
    def registers_a_column(self) -> int:
        """Registers beside the sums that each column of a lane takes: nvcc unrolls the loop."""
        ...

    def declare_input(self) -> None:
        """Declare x."""
        ...

    def declare_output(self) -> None:
        """Declare what the epilogue reads, and y."""
        ...

    def grid(self) -> dict[str, Any]:
        """Return the blocks by grid axis ("y", "z") that cover all columns of activations."""
        ...

    def begin(self, numbers: Sequence[Any], threads: Threads) -> None:
        """Prepare a tile, given its numbers on the axes of `grid`."""
        ...

    def stage(self, memory: Any, block: Any) -> None:
        """Bring the activations of a block of the weight's columns to shared memory."""
        ...

    def offset(self, column: Any) -> Any:
        """Tell where the activations of a column (of a block) lie in shared memory."""
        ...

    def multiply(self, memory: Any, sums: Any, turn: int, value: Any, at: Any) -> None:
        """Add `value` times the activations at an offset to the sums of a warp's row."""
        ...

    def store(self, memory: Any, sums: Any, rows: Sequence[Any], tile: Any) -> None:
        """Write the results; `rows` are the matrix rows of this warp's sums."""
        ...


def build_row_tiles(name: str, shape: TileShape, io: TileIO) -> Any:
    """Build the PrimFunc: x, the arrays of the weight, the epilogue's operands, y."""
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name(name)
            B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
            io.declare_input()
            weight = _declare_weight(shape)
            io.declare_output()
            grid = {"x": shape.tiles, **io.grid()}
            with launch(grid, shape.warps, shape.at_once) as (numbers, threads):
                _tile(shape, io, weight, numbers, threads)
    return builder.get()


def _declare_weight(shape: TileShape) -> dict[str, Any]:
    """Declare the arrays of the weight; layers whose nonzeros differ share the function."""
    from tvm import tirx

    length = tirx.Var("n_nonzeros", "int64")
    pieces = shape.tiles * shape.blocks * shape.mt
    return {
        "tiles": B.arg("tiles", B.Buffer((shape.tiles,), "int32")),
        "rows": B.arg("rows", B.Buffer((shape.tiles * shape.mt,), "int32")),
        "begins": B.arg("begins", B.Buffer((pieces + 1,), "int32")),
        "columns": B.arg("columns", B.Buffer((length,), "uint16")),
        "values": B.arg("values", B.Buffer((length,), "float32")),
    }


def _tile(
    shape: TileShape, io: TileIO, weight: dict[str, Any], numbers: list[Any], threads: Threads
) -> None:
    per_warp = shape.mt // shape.warps
    memory = shared(io.shared_floats)
    offsets, values = shared(shape.most, "int32"), shared(shape.most)
    begins = shared(shape.mt + 1, "int32")
    sums = local(per_warp * shape.nt)
    tile = kept(weight["tiles"][numbers[0]])
    io.begin(numbers[1:], threads)
    with B.unroll(0, per_warp * shape.nt) as i:
        B.buffer_store(sums, T.float32(0), [i])
    slots = [turn * shape.warps + threads.warp for turn in range(per_warp)]
    with B.serial(0, shape.blocks) as block:
        barrier()
        io.stage(memory, block)
        piece = (tile * shape.blocks + block) * shape.mt
        first, end = kept(weight["begins"][piece]), kept(weight["begins"][piece + shape.mt])
        with threads.share(shape.mt + 1) as i:
            B.buffer_store(begins, weight["begins"][piece + i] - first, [i])
        with threads.share(end - first) as i:
            column = T.Cast("int32", weight["columns"][first + i])
            B.buffer_store(offsets, io.offset(column), [i])
            B.buffer_store(values, weight["values"][first + i], [i])
        barrier()
        for turn, slot in enumerate(slots):
            ends = (begins[slot], begins[slot + 1])
            with _steps(shape.step, ends, (offsets, values)) as (at, value):
                for i in range(shape.step):
                    io.multiply(memory, sums, turn, value[i], at[i])
    barrier()
    io.store(memory, sums, [kept(weight["rows"][tile * shape.mt + s]) for s in slots], tile)


@contextmanager
def _steps(step: int, ends: tuple[Any, Any], arrays: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Loop over a row's nonzeros, `step` of them a turn, read as one vector of each array."""
    # Bounds of a loop that were read from shared memory would confuse TVM's placing of barriers.
    first, end = kept(T.floordiv(ends[0], step)), kept(T.floordiv(ends[1], step))
    with B.serial(0, end - first) as turn:
        read = []
        for array in arrays:
            register, begin = local(step, str(array.dtype)), (first + turn) * step
            piece, all_of_it = (
                (begin, 0) if step == 1 else (B.ramp(begin, 1, step), B.ramp(0, 1, step))
            )
            B.buffer_store(register, array[piece], [all_of_it])
            read.append(register)
        yield tuple(read)
