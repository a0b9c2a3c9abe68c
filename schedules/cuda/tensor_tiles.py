"""Tiles of gathered columns on tensor cores: asynchronous copies, `ldmatrix`, `mma` and `mma.sp`.

A block of threads computes a tile of rows for a tile of columns of activations (tokens, or pixels).
The tile's columns come chunk by chunk: the weight's elements as lanes hold them, the activations
gathered by the tile's list. Several chunks are on their way while one is multiplied. Warps share
the rows, the activations, and the steps of a chunk; sums of warps that shared steps are added at
the end, on the way through shared memory that also puts results in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ...dtypes import numpy_dtype
from ...formats.tensor_tiles import STEP_BYTES, step_columns
from .multiplier import Multiplier
from .ptx import commit_copies, copy_async, wait_for_copies
from .threads import Threads, barrier, kept, launch, local, part_of, shared_bytes, whole

# uint32 words of a step's 16 rows, and of what two of four chose for them.
_FRAGMENT_WORDS, _CHOSEN_WORDS = 128, 16
# Columns of the activations, and rows, that a fragment has.
FRAGMENT_COLUMNS, FRAGMENT_ROWS = 8, 16
# Bytes of a row of the weight in a register pair of activations; a step of two of four has two.
UNIT_BYTES = 32
# Banks of shared memory, and words of lines of which two fill them.
_BANKS, _SHORT_LINE = 32, 16


@dataclass(frozen=True)
class Lines:
    """Lines of 32-bit words in shared memory, whose banks differ for lanes in several lines.

    Attributes
    ----------
    width : int
        Words of a line.
    apart : int
        Banks from one line to the next. Short lines come in pairs, which lanes read at once: the
        second has the banks that the first leaves, and pairs are 8 banks apart.
    """

    width: int
    apart: int

    @property
    def _pitch(self) -> int:
        return self.width + (self.apart - self.width) % _BANKS

    def words(self, count: int) -> int:
        """Count the words of an even number of lines."""
        return count * (_SHORT_LINE + 4 if self.width == _SHORT_LINE else self._pitch)

    def start(self, line: Any) -> Any:
        """Tell where a line begins."""
        if self.width == _SHORT_LINE:
            pair, which = T.floordiv(line, 2), T.floormod(line, 2)
            return pair * (_BANKS + 8) + which * _SHORT_LINE
        return line * self._pitch


@dataclass(frozen=True)
class TensorShape:
    """What a block of threads computes, and how.

    Attributes
    ----------
    rows : int
        Of the weight.
    mt, kb, run, parts, in_order
        Of the packed format, see `formats.tensor_tiles`.
    nt : int
        Columns of activations of a block.
    warps_m, warps_n, warps_k : int
        Warps that share the rows, the columns of activations, and the steps of a chunk.
    stages : int
        Chunks in shared memory at a time.
    dtype : str
        "float16", "bfloat16" or "float32".
    rows_inner : bool
        Whether neighbours in y are rows of the weight, not columns of the activations.
    at_once : int
        Blocks that a multiprocessor shall hold.
    """

    rows: int
    mt: int
    kb: int
    run: int
    parts: tuple[str, ...]
    nt: int
    warps_m: int
    warps_n: int
    warps_k: int
    stages: int
    dtype: str
    rows_inner: bool
    in_order: bool = True
    at_once: int = 1

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.rows // self.mt)

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warps_m * self.warps_n * self.warps_k

    @property
    def mf(self) -> int:
        """Fragments of 16 rows of a warp."""
        return self.mt // (FRAGMENT_ROWS * self.warps_m)

    @property
    def nf(self) -> int:
        """Fragments of 8 columns of a warp."""
        return self.nt // (FRAGMENT_COLUMNS * self.warps_n)

    @property
    def slab_rows(self) -> int:
        """Rows of results that go through shared memory at a time."""
        return self.warps_m * FRAGMENT_ROWS

    @property
    def slab_lines(self) -> Lines:
        """Lines of a slab, which are as y's are.

        A warp writes 8 rows of 4 pairs of columns at once: one by one when lines are columns, pairs
        when they are rows.
        """
        return Lines(self.slab_rows, 4) if self.rows_inner else Lines(self.nt, 8)

    @property
    def slab_sums(self) -> int:
        """Sums of a slab of one of the warps that share steps."""
        return self.slab_lines.words(self.nt if self.rows_inner else self.slab_rows)

    def slab_place(self, row: Any, column: Any) -> Any:
        """Tell where a sum lies in a slab."""
        line, along = (column, row) if self.rows_inner else (row, column)
        return self.slab_lines.start(line) + along

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def piece(self) -> int:
        """Elements of 16 bytes."""
        return 16 // self.element_bytes

    def steps(self, part: str) -> int:
        """Count the steps of a chunk."""
        return self.kb // step_columns(part, self.dtype)

    def words(self, part: str) -> int:
        """Count the uint32 words of a chunk of a part's values."""
        return self.mt // 16 * self.steps(part) * _FRAGMENT_WORDS

    def chosen_words(self, part: str) -> int:
        """Count the words that say what a chunk of two of four keeps."""
        return self.mt // 16 * self.steps(part) * _CHOSEN_WORDS if part == "sparse" else 0

    @property
    def gathered_lines(self) -> Lines:
        """Gathered rows of float32; a warp reads 4 rows of 8 columns at once."""
        return Lines(self.nt, 8)

    @property
    def slot_elements(self) -> int:
        """Activations of a chunk in shared memory."""
        if self.run == 1 and self.element_bytes == 4:
            return self.gathered_lines.words(self.kb)
        return self.kb * self.nt

    @property
    def slot_words(self) -> int:
        """Words of a slot for values: those of either part."""
        return max(self.words(part) for part in self.parts)

    @property
    def slot_chosen(self) -> int:
        """Words of a slot for what two of four keep."""
        return max(self.chosen_words(part) for part in self.parts)

    @property
    def weight_bytes(self) -> int:
        """Shared memory of the weight's chunks: it comes first."""
        return 4 * self.stages * (self.slot_words + self.slot_chosen)

    def fragment(self, step: Any, i: int, place: WarpPlace) -> Any:
        """Count the fragments of a chunk before a warp's `i`-th one of a step."""
        return step * (self.mt // FRAGMENT_ROWS) + i * self.warps_m + place.m

    @property
    def slab_elements(self) -> int:
        """Sums in shared memory at a time; they take the place of the chunks."""
        return self.warps_k * self.slab_sums

    @property
    def memory_bytes(self) -> int:
        """Shared memory of a block."""
        activations = self.element_bytes * self.stages * self.slot_elements
        return max(self.weight_bytes + activations, 4 * self.slab_elements)


@dataclass(frozen=True)
class WarpPlace:
    """Which share of a block's work is this warp's: numbers along rows, columns and steps."""

    m: Any
    n: Any
    k: Any

    @classmethod
    def of(cls, shape: TensorShape, threads: Threads) -> WarpPlace:
        """Give every warp its numbers, rows the fastest."""
        rest = T.floordiv(threads.warp, shape.warps_m)
        return cls(
            T.floormod(threads.warp, shape.warps_m),
            T.floormod(rest, shape.warps_n),
            T.floordiv(rest, shape.warps_n),
        )


class TensorIO(Protocol):
    """How a tile reads activations and writes results; it keeps the buffers that it declares."""

    def declare_input(self) -> None:
        """Declare x."""
        ...

    def declare_output(self) -> None:
        """Declare what the epilogue reads, and y."""
        ...

    def grid(self) -> dict[str, Any]:
        """Return the blocks by grid axis ("y", "z") that cover all columns of activations."""
        ...

    def prepare(self) -> None:
        """Launch what has to be done before, if anything."""
        ...

    def begin(self, numbers: Sequence[Any], threads: Threads, place: WarpPlace, ring: Any) -> None:
        """Prepare a tile, given its numbers on the axes of `grid`.

        `ring` is shared memory for the activations of `stages` chunks.
        """
        ...

    def look_up(self, columns: Any, chunk: Any) -> None:
        """Read which columns of a chunk this thread will fetch."""
        ...

    def fetch(self, slot: Any) -> None:
        """Start to bring those activations to a slot of shared memory."""
        ...

    def arrive(self, slot: Any) -> None:
        """Finish what `fetch` left to be done after the multiplications of a turn."""
        ...

    def load(self, registers: Any, slot: Any, unit: Any, units: int) -> None:
        """Load a warp's fragments of `units` pieces of two, from that one of a slot on.

        A unit is `UNIT_BYTES` of the weight's columns: two registers of each fragment.
        """
        ...

    def store(self, slab: Any, row_of: Callable[[Any], Any]) -> None:
        """Write a slab of sums; `row_of` gives the matrix row of one of its rows."""
        ...


class WeightOperand(Protocol):
    """How a tile reads a packed weight; it keeps the buffers that it declares."""

    def declare(self) -> None:
        """Declare its arrays; layers whose nonzeros differ share the function."""
        ...

    def begin(self, number: Any, memory: Any, threads: Threads, place: WarpPlace) -> Any:
        """Return the tile that a block computes, and prepare it.

        `memory` is the block's shared memory, whose first `TensorShape.weight_bytes` are for this.
        """
        ...

    def chunks(self, part: str, tile: Any) -> tuple[Any, Any]:
        """Return a tile's first chunk of a part, and the one behind its last."""
        ...

    def columns(self, part: str) -> Any:
        """Return the list of columns that `TensorIO.look_up` reads."""
        ...

    def look_up(self, part: str, chunk: Any) -> None:
        """Read what this thread has to know to fetch a chunk."""
        ...

    def fetch(self, part: str, chunk: Any, slot: Any) -> None:
        """Start to bring a chunk to a slot of shared memory."""
        ...

    def load(self, a: Any, chosen: Any, i: int, step: Any, slot: Any) -> None:
        """Load a warp's fragment of its `i`-th 16 rows at a step of a slot.

        It goes to four registers of `a`; of two of four, what is kept goes to `chosen`, else None.
        """
        ...

    def row(self, place: Any) -> Any:
        """Return the matrix row of a row of the tiles."""
        ...


class TileWeight:
    """Tiles of listed columns, as `formats.tensor_tiles` packs them."""

    def __init__(self, shape: TensorShape) -> None:
        self.shape = shape
        self.arrays: dict[str, Any] = {}

    def declare(self) -> None:
        """Declare the arrays."""
        shape = self.shape
        self._declare("tiles", "int32", shape.tiles)
        self._declare("rows", "int32", shape.tiles * shape.mt)
        for part in shape.parts:
            self._declare(f"{part}_begins", "int32", shape.tiles + 1)
            self._declare(f"{part}_columns", "int32")
            self._declare(f"{part}_values", "uint32")
            if part == "sparse":
                self._declare("sparse_chosen", "uint32")

    def _declare(self, name: str, dtype: str, length: int | None = None) -> None:
        extent = tirx.Var(f"n_{name}", "int64") if length is None else length
        self.arrays[name] = B.arg(name, B.Buffer((extent,), dtype))

    def begin(self, number: Any, memory: Any, threads: Threads, place: WarpPlace) -> Any:
        """Cut shared memory up, and look the tile's number up."""
        shape = self.shape
        self.threads, self.place = threads, place
        values, chosen = shape.stages * shape.slot_words, shape.stages * shape.slot_chosen
        self.values = part_of(memory, 0, values, "uint32")
        self.chosen = part_of(memory, 4 * values, chosen, "uint32") if chosen else None
        return kept(self.arrays["tiles"][number])

    def chunks(self, part: str, tile: Any) -> tuple[Any, Any]:
        """Read where a tile's chunks begin and end."""
        begins = self.arrays[f"{part}_begins"]
        return kept(begins[tile]), kept(begins[tile + 1])

    def columns(self, part: str) -> Any:
        """Return the list."""
        return self.arrays[f"{part}_columns"]

    def look_up(self, part: str, chunk: Any) -> None:
        """Do nothing: all chunks are of one size."""

    def fetch(self, part: str, chunk: Any, slot: Any) -> None:
        """Copy values, and what two of four keep."""
        shape = self.shape
        self._copy(f"{part}_values", self.values, shape.words(part), shape.slot_words, chunk, slot)
        if part == "sparse":
            words = shape.chosen_words(part)
            self._copy("sparse_chosen", self.chosen, words, shape.slot_chosen, chunk, slot)

    def _copy(self, name: str, to: Any, words: int, slot_words: int, chunk: Any, slot: Any) -> None:
        with self.threads.share(words // 4) as piece:
            source = self.arrays[name][chunk * words + piece * 4]
            copy_async(to[slot * slot_words + piece * 4], source, 16)

    def load(self, a: Any, chosen: Any, i: int, step: Any, slot: Any) -> None:
        """Load a fragment as it lies in memory."""
        lane, shape = self.threads.lane, self.shape
        fragment = shape.fragment(step, i, self.place)
        words = slot * shape.slot_words + fragment * _FRAGMENT_WORDS + lane * 4
        B.buffer_store(a, self.values[B.ramp(words, 1, 4)], [B.ramp(i * 4, 1, 4)])
        if chosen is not None:
            assert self.chosen is not None
            # Lanes 4g and 4g + 1 are asked; the others read along.
            word = T.floordiv(lane, 4) * 2 + T.floormod(lane, 2)
            at = slot * shape.slot_chosen + fragment * _CHOSEN_WORDS + word
            B.buffer_store(chosen, self.chosen[at], [i])

    def row(self, place: Any) -> Any:
        """Look a row up where some were moved."""
        return place if self.shape.in_order else self.arrays["rows"][place]


def build_tensor_tiles(
    name: str, shape: TensorShape, io: TensorIO, weight: WeightOperand | None = None
) -> Any:
    """Build the PrimFunc: x, the arrays of the weight, the epilogue's operands, y.

    `weight` is by default one of listed columns.
    """
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name(name)
            B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
            io.declare_input()
            operand = weight or TileWeight(shape)
            operand.declare()
            io.declare_output()
            io.prepare()
            grid = {"x": shape.tiles, **io.grid()}
            with launch(grid, shape.warps, shape.at_once) as (numbers, threads):
                _Tile(shape, io, operand, threads).emit(numbers)
    return builder.get()


class _Tile:
    """Emits the work of a block of threads."""

    def __init__(
        self, shape: TensorShape, io: TensorIO, weight: WeightOperand, threads: Threads
    ) -> None:
        self.shape, self.io, self.weight, self.threads = shape, io, weight, threads
        self.place = WarpPlace.of(shape, threads)

    def emit(self, numbers: Sequence[Any]) -> None:
        shape = self.shape
        memory = shared_bytes(shape.memory_bytes)
        elements = shape.stages * shape.slot_elements
        ring = part_of(memory, shape.weight_bytes, elements, shape.dtype)
        self.slab = part_of(memory, 0, shape.slab_elements, "float32")
        self.sums = local(shape.mf * shape.nf * 4)
        with B.unroll(0, shape.mf * shape.nf * 4) as i:
            B.buffer_store(self.sums, T.float32(0), [i])
        tile = self.weight.begin(numbers[0], memory, self.threads, self.place)
        self.io.begin(numbers[1:], self.threads, self.place, ring)
        for part in shape.parts:
            self._part(part, tile)
        self._results(tile)

    def _part(self, part: str, tile: Any) -> None:
        """Multiply by the chunks of a part, while the next ones come."""
        stages = self.shape.stages
        first, end = self.weight.chunks(part, tile)
        count = kept(end - first)
        for stage in range(stages - 1):
            with B.If(count > stage), B.Then():
                self._look_up(part, first + stage)
                self._fetch(part, first + stage, stage)
                self.io.arrive(stage)
            commit_copies()
        with B.If(count > stages - 1), B.Then():
            self._look_up(part, first + (stages - 1))
        slot, next_slot = local(1, "int32"), local(1, "int32")
        B.buffer_store(slot, T.int32(0), [0])
        B.buffer_store(next_slot, T.int32(stages - 1), [0])
        with B.serial(0, count) as turn:
            wait_for_copies(stages - 2)
            barrier()
            coming = turn + (stages - 1)
            with B.If(coming < count), B.Then():
                self._fetch(part, first + coming, next_slot[0])
            commit_copies()
            self._multiply(part, slot[0])
            with B.If(coming < count), B.Then():
                self.io.arrive(next_slot[0])
            with B.If(coming + 1 < count), B.Then():
                self._look_up(part, first + coming + 1)
            for register in (slot, next_slot):
                turned = T.Select(register[0] == stages - 1, T.int32(0), register[0] + 1)
                B.buffer_store(register, turned, [0])
        # The next part, or the results, come to the same place.
        wait_for_copies(0)
        barrier()

    def _look_up(self, part: str, chunk: Any) -> None:
        """Read what has to be known to fetch a chunk, a turn before it is needed."""
        self.weight.look_up(part, chunk)
        self.io.look_up(self.weight.columns(part), chunk)

    def _fetch(self, part: str, chunk: Any, slot: Any) -> None:
        """Start to bring a chunk to a slot."""
        self.weight.fetch(part, chunk, slot)
        self.io.fetch(slot)

    def _multiply(self, part: str, slot: Any) -> None:
        """Multiply a warp's rows by its columns, step by step."""
        shape = self.shape
        steps = shape.steps(part) // shape.warps_k
        units = STEP_BYTES[part] // UNIT_BYTES
        a = whole(local(shape.mf * 4, "uint32"))
        b = whole(local(shape.nf * 2 * units, "uint32"))
        chosen = local(shape.mf, "uint32") if part == "sparse" else None
        multiplier = Multiplier(shape.dtype, part, a, b, chosen)
        for number in range(steps):
            step = self.place.k * steps + number
            self.io.load(b, slot, step * units, units)
            for i in range(shape.mf):
                self.weight.load(a, chosen, i, step, slot)
            multiplier.multiply(self.sums, shape.mf, shape.nf)

    def _results(self, tile: Any) -> None:
        """Bring sums to shared memory, 16 rows a warp at a time, and have them written."""
        shape = self.shape
        for i in range(shape.mf):
            if i:
                barrier()
            self._to_slab(i)
            barrier()
            first = tile * shape.mt + i * shape.slab_rows
            self.io.store(self.slab, self._rows_from(first))

    def _rows_from(self, first: Any) -> Callable[[Any], Any]:
        return lambda row: self.weight.row(first + row)

    def _to_slab(self, i: int) -> None:
        shape, place, lane = self.shape, self.place, self.threads.lane
        base = place.k * shape.slab_sums
        for j in range(shape.nf):
            column = (place.n * shape.nf + j) * FRAGMENT_COLUMNS + T.floormod(lane, 4) * 2
            for half in range(2):
                row = place.m * FRAGMENT_ROWS + T.floordiv(lane, 4) + 8 * half
                first = (i * shape.nf + j) * 4 + 2 * half
                if shape.rows_inner:
                    for e in range(2):
                        at = base + shape.slab_place(row, column + e)
                        B.buffer_store(self.slab, self.sums[first + e], [at])
                else:
                    at = base + shape.slab_place(row, column)
                    pair = self.sums[B.ramp(first, 1, 2)]
                    B.buffer_store(self.slab, pair, [B.ramp(at, 1, 2)])


def summed_up(slab: Any, shape: TensorShape, row: Any, column: Any, count: int) -> list[Any]:
    """Add what the warps that shared the steps have summed up for one or two neighbours in y."""
    at = shape.slab_place(row, column)
    total = local(count)
    whole = B.ramp(0, 1, count) if count > 1 else 0
    for k in range(shape.warps_k):
        first = k * shape.slab_sums + at
        part = slab[B.ramp(first, 1, count) if count > 1 else first]
        B.buffer_store(total, total[whole] + part if k else part, [whole])
    return [total[i] for i in range(count)]
