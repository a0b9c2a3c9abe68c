"""The kernel family of x86: Y = W X over panels of activations, sparse and dense.

Activations are taken a panel of `nt` vectors at a time. Per block of `kb` columns of W the panel is
packed into L1 as [kb][nt * lanes], and every panel of `mr` weight rows runs its register tile over
it. What differs between operators is how a panel is packed and how results are stored (`matmul_io`,
`conv_io`); what differs between formats is the inner loop (`panel_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ...panels import Tiles, split_evenly
from ..vectors import Vectors
from .dense_kernel import thread_loop
from .panel_weights import DenseWeight, GatheredWeight, MaskedWeight, SlicedWeight
from .register_tile import RegisterTile

Weight = MaskedWeight | SlicedWeight | GatheredWeight | DenseWeight

# The first column of a range, and the one behind its last.
Share = tuple[int, int]


@dataclass(frozen=True)
class SymbolicTiles:
    """Panels over a number of columns that is known when the kernel runs, as even as others.

    Attributes
    ----------
    nt : int
        Vectors of the widest panel that there may be.
    vectors, total : expr
        Vectors of columns, and the panels over them.
    """

    nt: int
    vectors: Any
    total: Any


def split_columns(columns: Any, nt: int, lanes: int) -> Tiles | SymbolicTiles:
    """Cover `columns`, a number or an expression, by even panels of at most `nt` vectors."""
    if isinstance(columns, int):
        return split_evenly(columns, nt, lanes)
    vectors = T.floordiv(columns + lanes - 1, lanes)
    return SymbolicTiles(nt, vectors, T.floordiv(vectors + nt - 1, nt))


class PanelIO(Protocol):
    """How one operator feeds and drains the register tile."""

    def declare_input(self) -> None:
        """Declare the activations, the first argument."""

    def declare_output(self) -> None:
        """Declare the epilogue's operands and the result, the last arguments."""

    def open_views(self) -> None:
        """Alias the arguments of several dimensions as flat buffers, once all are declared."""

    def columns(self) -> Any:
        """Columns of X that one image (or the whole batch of tokens) has."""

    def images(self) -> Any:
        """How often the whole product runs, each time on its own X: images, times groups."""

    def group(self, image: Any) -> Any:
        """Which group's weight an image is multiplied with."""

    def prepare(self, image: Any, thread: Any, shares: Sequence[Share]) -> None:
        """Emit what a thread does before its panels of an image, which cover its share."""

    def block_of(self, image: Any, first: Any, nt: int, block: Any) -> tuple[Any, Any]:
        """Emit what brings a block of X to hand, [kb][nt vectors]; return buffer and offset.

        Padding in the weight names a row of zeros behind it, as the format was told.
        """

    def begin_unit(self, row_range: tuple[Any, Any], first: Any, nt: int) -> None:
        """Emit what one unit of work needs before its first block."""

    def sums(self, rows: int, width: int, first: Any) -> tuple[Any, Any]:
        """Return a buffer of rows, and where in it the unit's lie between blocks of columns."""

    def store_rows(self, tile: RegisterTile, rows: Sequence[Any], image: Any, first: Any) -> None:
        """Emit the final store of a register tile."""

    def end_unit(self, image: Any, first: Any, nt: int, row_range: tuple[Any, Any]) -> None:
        """Emit what comes after the last block of a unit."""


# Called once the arguments are declared.
Narrowed = Callable[[], PanelIO]


@dataclass(frozen=True)
class PanelShape:
    """The sizes that a panel kernel is specialised to.

    `splits` are the bounds of the row ranges that run as separate units: (matrix rows, panels) at
    each bound.
    """

    rows: int
    columns: int
    mr: int
    nt: int
    kb: int
    splits: tuple[tuple[int, int], ...]
    lanes: int
    threads: int

    @property
    def blocks(self) -> int:
        """Blocks of columns."""
        return -(-self.columns // self.kb)

    @property
    def tallest(self) -> int:
        """Rows of the largest row range, with the slots behind the last row."""
        bounds = self.splits
        return max(max(hi[0] - lo[0], (hi[1] - lo[1]) * self.mr) for lo, hi in pairwise(bounds))


def build_panel_kernel(
    name: str, shape: PanelShape, io: PanelIO, weight: Weight, narrower: Mapping[int, Narrowed] = {}
) -> Any:
    """Build the PrimFunc: arguments x, weight arrays, epilogue vectors, epilogue tensors, y.

    `narrower` says, for vectors of fewer lanes, how to get the same `io` on them: columns whose
    number is known when the kernel runs take the narrowest one that holds them all.
    """
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name(name)
            B.func_attr({"tirx.noalias": True, "op_pattern": 8})
            io.declare_input()
            args = weight.declare()
            io.declare_output()
            io.open_views()
            _emit_by_size(shape, io, weight, args, sorted(narrower.items()))
    return builder.get()


def _emit_by_size(
    shape: PanelShape,
    io: PanelIO,
    weight: Weight,
    args: dict[str, Any],
    narrower: Sequence[tuple[int, Narrowed]],
) -> None:
    """Emit the kernel once for columns that fit a narrow vector, and once for all other numbers."""
    if not narrower:
        _emit_images(shape, io, weight, args)
        return
    lanes, narrowed = narrower[0]
    with B.If(io.columns() <= lanes):
        with B.Then():
            narrow = replace(shape, lanes=lanes, nt=1, threads=1)
            _emit_images(narrow, narrowed(), weight, args)
        with B.Else():
            _emit_by_size(shape, io, weight, args, narrower[1:])


def _emit_images(shape: PanelShape, io: PanelIO, weight: Weight, args: dict[str, Any]) -> None:
    tiles = split_columns(io.columns(), shape.nt, shape.lanes)
    images, threads = io.images(), shape.threads
    if isinstance(images, int) and images > 1 and images % threads == 0:
        # Whole images for every thread.
        with thread_loop(images, threads) as image:
            _emit_image(shape, io, weight, args, tiles, image, 1)
    else:
        with B.serial(0, images) as image:
            _emit_image(shape, io, weight, args, tiles, image, threads)


def _emit_image(
    shape: PanelShape,
    io: PanelIO,
    weight: Weight,
    args: dict[str, Any],
    tiles: Tiles | SymbolicTiles,
    image: Any,
    threads: int,
) -> None:
    """All panels of an image. Threads start once: each prepares what it will read itself."""
    splits = len(shape.splits) - 1
    units = tiles.total * splits
    with thread_loop(threads, threads) as thread:
        io.prepare(image, thread, share_out(tiles, splits, threads, shape.lanes))
        if threads == 1:
            with B.serial(0, units) as unit:
                _emit_unit(shape, io, weight, args, tiles, image, unit)
            return
        chunk = _chunk(units, threads)
        with B.serial(0, chunk) as step:
            # Held in a buffer: TVM's simplifier does not come to an end over some sums of a
            # thread and a step.
            held = B.alloc_buffer((1,), "int32", scope="global")
            B.buffer_store(held, T.Cast("int32", thread * chunk + step), [0])
            with B.If(held[0] < T.Cast("int32", units)), B.Then():
                _emit_unit(shape, io, weight, args, tiles, image, held[0])


def _chunk(units: Any, threads: int) -> Any:
    """Tell how many units each thread takes; the last may find fewer."""
    if threads == 1:
        return units
    return -(-units // threads) if isinstance(units, int) else T.floordiv(units - 1, threads) + 1


def share_out(tiles: Tiles | SymbolicTiles, splits: int, threads: int, lanes: int) -> list[Share]:
    """Tell which columns each thread's panels cover; nothing where their number is symbolic."""
    if isinstance(tiles, SymbolicTiles):
        return []

    def start(tile: int) -> int:
        narrow = max(0, tile - tiles.full)
        return ((tile - narrow) * tiles.nt + narrow * tiles.nt_rest) * lanes

    units = tiles.total * splits
    bounds = [min(units, _chunk(units, threads) * thread) for thread in range(threads + 1)]
    return [(start(low // splits), start(-(-high // splits))) for low, high in pairwise(bounds)]


def _emit_unit(
    shape: PanelShape,
    io: PanelIO,
    weight: Weight,
    args: dict[str, Any],
    tiles: Tiles | SymbolicTiles,
    image: Any,
    unit: Any,
) -> None:
    splits = len(shape.splits) - 1
    tile_index = unit if splits == 1 else T.floordiv(unit, splits)

    def emit(first: Any, nt: int) -> None:
        if splits == 1:
            _emit_rows(shape, io, weight, args, nt, image, first, shape.splits[0], shape.splits[1])
            return
        part = T.floormod(unit, splits)
        for index, (low, high) in enumerate(pairwise(shape.splits)):
            with B.If(part == index), B.Then():
                _emit_rows(shape, io, weight, args, nt, image, first, low, high)

    emit_tile(tiles, shape.lanes, tile_index, emit)


def emit_tile(
    tiles: Tiles | SymbolicTiles, lanes: int, index: Any, emit: Callable[[Any, int], None]
) -> None:
    """Emit what works on one panel, `emit`(first column, vectors), for every width."""
    if isinstance(tiles, SymbolicTiles):
        _emit_symbolic_tile(tiles, lanes, index, emit)
        return
    width, narrow = tiles.nt * lanes, tiles.nt_rest * lanes
    if not tiles.rest:
        emit(index * width, tiles.nt)
    else:
        with B.If(index < tiles.full):
            with B.Then():
                emit(index * width, tiles.nt)
            with B.Else():
                emit(tiles.full * width + (index - tiles.full) * narrow, tiles.nt_rest)


def _emit_symbolic_tile(
    tiles: SymbolicTiles, lanes: int, index: Any, emit: Callable[[Any, int], None]
) -> None:
    narrow = T.floordiv(tiles.vectors, tiles.total)
    wider = tiles.vectors - narrow * tiles.total
    # Held in buffers: the choices below would compute them again.
    held = B.alloc_buffer((2,), "int64", scope="global")
    first = T.min(index, wider) * (narrow + 1) + T.max(index - wider, 0) * narrow
    width = narrow + T.if_then_else(index < wider, 1, 0)
    B.buffer_store(held, T.Cast("int64", first * lanes), [0])
    B.buffer_store(held, T.Cast("int64", width), [1])
    for vectors in range(tiles.nt, 0, -1):
        with B.If(held[1] == vectors), B.Then():
            emit(held[0], vectors)


def _emit_rows(
    shape: PanelShape,
    io: PanelIO,
    weight: Weight,
    args: dict[str, Any],
    nt: int,
    image: Any,
    first: Any,
    low: tuple[int, int],
    high: tuple[int, int],
) -> None:
    """One panel of activations times the weight rows from `low` to `high`."""
    vectors = Vectors(shape.lanes)
    width = nt * shape.lanes
    io.begin_unit((low[0], high[0]), first, nt)
    sums, origin = io.sums(shape.tallest, width, first) if shape.blocks > 1 else (None, 0)
    with B.serial(0, shape.blocks) as block:
        x, offset = io.block_of(image, first, nt, block)
        with B.serial(low[1], high[1]) as row_panel:
            tile = RegisterTile(vectors, shape.mr, nt)
            rows = [weight.row(args, block, row_panel, r) for r in range(shape.mr)]

            def at(r: int, rows: list[Any] = rows) -> Any:
                return origin + (rows[r] - low[0]) * width

            tile.clear()
            weight.accumulate(args, tile, io.group(image), block, row_panel, x, offset)
            if sums is None:
                io.store_rows(tile, rows, image, first)
            else:
                # Added behind the block rather than loaded before it: the loads then wait for
                # nothing, and the multiply-adds do not wait for them.
                with B.If(block > 0), B.Then():
                    tile.add(sums, at)
                with B.If(block == shape.blocks - 1):
                    with B.Then():
                        io.store_rows(tile, rows, image, first)
                    with B.Else():
                        tile.write(sums, at)
    io.end_unit(image, first, nt, (low[0], high[0]))
