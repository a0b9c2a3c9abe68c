"""Tiles of rows over gathered columns, for tensor cores: dense, two of four, or one of each.

Every tile of rows lists the columns that it needs; activations are gathered by the list, so inside
the tile the product is dense (tile-wise sparsity: C. Guo et al., "Accelerating Sparse DNN Models
without Hardware-Support via Tile-Wise Sparsity", SC 2020, section IV). Blocks, vectors and whole
channels are special cases.

As the list is free, it can also be arranged so that no row has more than two nonzeros in any four
of its columns, which sparse tensor cores want: a 2:4 weight needs its own columns; V:N:M (R. Castro
et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", SC 2023)
those that a tile chose; any other weight some columns twice, each time with other elements of them.
Of float32, sparse tensor cores take one nonzero in any two columns: an element is a pair of halves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import FLOAT_TYPES, numpy_dtype
from .base import Match, PackedWeight, check_matrix
from .order import PackedOrder

ROWS = 16
MOST_ROWS = 256
# Bytes of a row that one instruction multiplies by.
STEP_BYTES = {"dense": 32, "sparse": 64}
# Columns that may be fetched as one, and one.
RUNS = (1, 8)
LANES = 32
# Groups that wait for their next column at a time.
_OPEN = 16
# Columns listed for each that is needed, up to which they are left as they stand.
_MOST_LISTED = 1.1


def step_columns(part: str, dtype: str) -> int:
    """Count the columns that one instruction multiplies by."""
    return STEP_BYTES[part] // numpy_dtype(dtype).itemsize


@dataclass(frozen=True)
class Grouping:
    """What sparse tensor cores want: at most `most` nonzeros in each `size` columns of a row."""

    size: int
    most: int

    @classmethod
    def of(cls, dtype: Any) -> Grouping:
        """Two of four 16-bit elements, one of two of 32 bits."""
        return cls(2, 1) if np.dtype(dtype).itemsize == 4 else cls(4, 2)


@dataclass(frozen=True)
class TileColumns:
    """The columns of one tile and what the tile holds in them.

    Attributes
    ----------
    entries : numpy.ndarray
        int32: the first column of each run.
    values : numpy.ndarray
        [rows of the tile, entries * run].
    """

    entries: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TensorTiles:
    """Tiles of `mt` rows; columns come in runs of `run`, and in chunks of `kb`.

    A column is held in the dense part when more than half of the tile's rows have it, else in the
    part of two of four, of the parts that this format has. The arrays, with T tiles, each part's
    with its name in front (``dense_`` or ``sparse_``):

    - ``tiles`` int32 [T]: the tiles, those with the most work first;
    - ``rows`` int32 [T * mt]: the matrix row of each of a tile's rows; >= M behind the last one.
      Rows without a nonzero come last if that saves work;
    - ``begins`` int32 [T + 1]: where a tile's chunks begin;
    - ``columns`` int32 [chunks * kb / run]: the first column of each run; the last one is repeated
      to the end of a chunk, with zeros;
    - ``values`` uint32: pairs of elements as lanes hold them, see `schedules.cuda.ptx.multiply`:
      [chunk, step, rows / 16, lane, 4]; a float32 is a pair;
    - ``chosen`` uint32 [chunk, step, rows / 16, 16], of two of four only: word 2g + h of 16 rows
      says which of a step's columns row g keeps in its low half, row g + 8 in its high half; h
      is the half of the step.

    The packed config has `in_order`: 1 when slots are rows, so that neighbours may be stored as
    one.
    """

    name: str
    dense: bool
    sparse: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """What a tile is cut into."""
        return ("dense",) * self.dense + ("sparse",) * self.sparse

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        mt, kb, run = (int(config[key]) for key in ("mt", "kb", "run"))
        dtype = str(weight.dtype) if str(weight.dtype) in FLOAT_TYPES else "float16"
        step = step_columns(self.parts[-1], dtype)
        if mt % ROWS or not ROWS <= mt <= MOST_ROWS:
            return Match(False, f"tiles of {mt} rows; tensor cores take multiples of {ROWS}")
        if kb % step or kb < step:
            return Match(False, f"chunks of {kb} columns; tensor cores take multiples of {step}")
        if run not in RUNS:
            return Match(False, f"runs of {run} columns; there can be {RUNS[0]} or {RUNS[1]}")
        fits = check_matrix(weight, FLOAT_TYPES)
        if fits and weight.shape[1] % run:
            return Match(False, f"{weight.shape[1]} columns are not whole runs of {run}")
        return fits

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a matrix [rows, columns]."""
        mt, kb, run = (int(config[key]) for key in ("mt", "kb", "run"))
        order = _row_order(weight, mt, run)
        tiles = -(-len(order) // mt)
        padded = np.zeros((tiles * mt, weight.shape[1]), weight.dtype)
        padded[: len(order)] = weight[order]
        rows = np.arange(len(weight), len(weight) + tiles * mt, dtype=np.int32)
        rows[: len(order)] = order
        pieces = [self._split(tile, run) for tile in padded.reshape(tiles, mt, -1)]
        arrays: dict[str, np.ndarray] = {}
        work = np.zeros(tiles)
        for number, part in enumerate(self.parts):
            packed = _pack_part(part, [piece[number] for piece in pieces], mt, kb, run)
            arrays |= {f"{part}_{key}": value for key, value in packed.items()}
            work += np.diff(packed["begins"]) / (2 if part == "sparse" else 1)
        order_of_tiles = np.argsort(-work, kind="stable").astype(np.int32)
        in_order = int(np.array_equal(order, np.arange(len(order))))
        return PackedWeight(
            self.name,
            (weight.shape[0], weight.shape[1]),
            {"mt": mt, "kb": kb, "run": run, "in_order": in_order, "dtype": str(weight.dtype)},
            {"tiles": order_of_tiles, "rows": rows, **arrays},
        )

    def _split(self, tile: np.ndarray, run: int) -> list[TileColumns]:
        """Deal the columns of a tile [rows, columns] to the parts."""
        counts = np.count_nonzero(tile, axis=0)
        limit = len(tile) / 2 if self.dense and self.sparse else 0 if self.dense else len(tile)
        is_dense = _whole_runs(counts > limit, run)
        chosen = {"dense": is_dense, "sparse": _whole_runs(counts > 0, run) & ~is_dense}
        found = []
        for part in self.parts:
            columns = np.flatnonzero(chosen[part])
            held = tile[:, columns]
            if part == "sparse":
                columns, held = two_of_four(columns, held, run)
            found.append(TileColumns(columns[::run].astype(np.int32), held))
        return found

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mt, kb, run = (packed.config[key] for key in ("mt", "kb", "run"))
        dtype = numpy_dtype(packed.config["dtype"])
        slots = packed.arrays["rows"]
        padded = np.zeros((len(slots), columns), dtype)
        for part in self.parts:
            begins = packed.arrays[f"{part}_begins"]
            firsts = packed.arrays[f"{part}_columns"].reshape(-1, kb // run)
            named = (firsts[..., None] + np.arange(run)).reshape(len(firsts), kb)
            held = _unpack_part(part, packed, mt, kb, dtype)
            for tile in range(len(begins) - 1):
                own = padded[tile * mt : (tile + 1) * mt]
                for chunk in range(begins[tile], begins[tile + 1]):
                    row, place = np.nonzero(held[chunk] != 0)
                    own[row, named[chunk, place]] = held[chunk][row, place]
        restored = np.zeros((rows, columns), dtype)
        real = slots < rows
        restored[slots[real]] = padded[real]
        return restored

    def order(self, packed: PackedWeight) -> PackedOrder:
        """Tell where rows and columns went, of all parts together."""
        rows = packed.arrays["rows"][None]
        return PackedOrder(rows, together=packed.config["mt"], run=packed.config["run"])


def _row_order(weight: np.ndarray, mt: int, run: int) -> np.ndarray:
    """Put rows without a nonzero last, where tiles then need fewer columns."""
    filled = np.any(weight != 0, axis=1)
    as_it_is = np.arange(len(weight), dtype=np.int32)
    compact = np.concatenate([as_it_is[filled], as_it_is[~filled]])

    def needed(order: np.ndarray) -> int:
        starts = np.arange(0, len(order), mt)
        held = np.logical_or.reduceat(weight[order] != 0, starts, axis=0)
        return int(sum(np.count_nonzero(_whole_runs(row, run)) for row in held))

    return compact if needed(compact) < needed(as_it_is) else as_it_is


def _whole_runs(chosen: np.ndarray, run: int) -> np.ndarray:
    """Choose whole runs of columns wherever one of their columns is chosen."""
    if run == 1:
        return chosen
    return np.repeat(chosen.reshape(-1, run).any(axis=1), run)


def two_of_four(columns: np.ndarray, tile: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrange a tile so that no row has more than two nonzeros in any four columns, see `Grouping`.

    Parameters
    ----------
    columns : numpy.ndarray
        The columns, ascending; whole runs.
    tile : numpy.ndarray
        What the tile holds in them.
    run : int
        Columns that stay together, in their order.

    Returns
    -------
    tuple
        Columns, some named more than once, and what to hold in each.
    """
    if not len(columns):
        return columns, tile
    grouping = Grouping.of(tile.dtype)
    if run > 1:
        return _rounds(columns, tile, grouping)
    mask = tile != 0
    listed, held = _in_order(columns, mask, grouping) or _fill_groups(mask, grouping)
    return columns[listed], np.where(held, tile[:, listed], tile.dtype.type(0))


def listed_a_column(tile: np.ndarray, run: int, beside_dense: bool) -> float:
    """Count how often two of four lists each column that it holds of a tile [rows, columns].

    Parameters
    ----------
    run : int
        Columns that stay together.
    beside_dense : bool
        Whether the fullest columns are in a dense part.
    """
    entries = TensorTiles("", beside_dense, True)._split(tile, run)[-1].entries
    return len(entries) / len(np.unique(entries)) if len(entries) else 1.0


def _in_order(
    columns: np.ndarray, mask: np.ndarray, grouping: Grouping
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the columns as they stand if their groups are fit, by place or by number."""
    size = grouping.size
    for groups in (np.arange(len(columns)) // size, columns // size):
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        # Where most groups lack columns, others fill them up better.
        if size * len(starts) > _MOST_LISTED * len(columns) + size:
            continue
        counts = np.add.reduceat(mask, starts, axis=1, dtype=np.int64)
        if counts.max(initial=0) > grouping.most:
            continue
        sizes = np.diff(np.append(starts, len(columns)))
        is_real = np.arange(size) < sizes[:, None]
        # Groups that lack columns name their first one again, for nothing.
        places = np.where(is_real, starts[:, None] + np.arange(size), starts[:, None]).reshape(-1)
        return places, mask[:, places] & is_real.reshape(-1)
    return None


def _rounds(
    columns: np.ndarray, tile: np.ndarray, grouping: Grouping
) -> tuple[np.ndarray, np.ndarray]:
    """List runs again as long as some group of their columns holds too many."""
    listed, held = [], []
    left = tile.copy()
    while len(columns):
        groups = (left != 0).reshape(len(left), -1, grouping.size)
        now = (np.cumsum(groups, axis=2) <= grouping.most).reshape(left.shape)
        listed.append(columns)
        held.append(np.where(now, left, left.dtype.type(0)))
        left = np.where(now, left.dtype.type(0), left)
        kept = _whole_runs(np.any(left != 0, axis=0), RUNS[1])
        columns, left = columns[kept], left[:, kept]
    return np.concatenate(listed), np.concatenate(held, axis=1)


def _fill_groups(mask: np.ndarray, grouping: Grouping) -> tuple[np.ndarray, np.ndarray]:
    """Deal columns to groups, first fit; what no group takes of one is dealt again.

    Returns the column of each place, and which rows hold their element there.
    """
    rows = len(mask)
    groups: list[list[tuple[int, np.ndarray]]] = []
    full: list[list[tuple[int, np.ndarray]]] = []
    counts = np.zeros((0, rows), np.int8)
    waiting = [(column, mask[:, column]) for column in range(mask.shape[1])]
    while waiting:
        column, wanted = waiting.pop()
        fits = np.flatnonzero(np.all(counts + wanted <= grouping.most, axis=1))
        if len(fits):
            number, taken = int(fits[0]), wanted
        elif len(groups) < _OPEN:
            groups.append([])
            counts = np.concatenate([counts, np.zeros((1, rows), np.int8)])
            number, taken = len(groups) - 1, wanted
        else:
            free = (counts < grouping.most) & wanted
            number = int(np.argmax(free.sum(axis=1)))
            taken = free[number]
            waiting.append((column, wanted & ~taken))
        groups[number].append((column, taken))
        counts[number] += taken
        if len(groups[number]) == grouping.size:
            full.append(groups.pop(number))
            counts = np.delete(counts, number, axis=0)
    return _listed([*full, *groups], rows, grouping.size)


def _listed(
    groups: Sequence[list[tuple[int, np.ndarray]]], rows: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.zeros(rows, bool)
    filled = [group + [(group[0][0], nothing)] * (size - len(group)) for group in groups]
    places = [place for group in filled for place in group]
    return np.array([column for column, _ in places]), np.stack([m for _, m in places], axis=1)


def _pack_part(
    part: str, tiles: Sequence[TileColumns], mt: int, kb: int, run: int
) -> dict[str, np.ndarray]:
    """Lay the tiles of one part out in chunks."""
    chunks = [-(-tile.values.shape[1] // kb) for tile in tiles]
    begins = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int32)
    # One chunk too many is never read, and makes arrays that are not empty.
    total = max(1, int(begins[-1]))
    columns = np.zeros((total, kb // run), np.int32)
    dtype = tiles[0].values.dtype
    values = np.zeros((mt, total * kb), dtype)
    for tile, first, count in zip(tiles, begins, chunks, strict=False):
        listed = np.zeros(count * kb // run, np.int32)
        listed[: len(tile.entries)] = tile.entries
        listed[len(tile.entries) :] = tile.entries[-1] if len(tile.entries) else 0
        columns[first : first + count] = listed.reshape(count, kb // run)
        start = first * kb
        values[:, start : start + tile.values.shape[1]] = tile.values
    packed = {"begins": begins, "columns": columns.reshape(-1)}
    by_chunk = np.ascontiguousarray(values.reshape(mt, total, kb).transpose(1, 0, 2))
    if part == "dense":
        return packed | {"values": to_fragments(by_chunk.view(np.uint16))}
    kept, chosen = _compress(by_chunk)
    return packed | {"values": to_fragments(kept), "chosen": chosen}


def to_fragments(values: np.ndarray) -> np.ndarray:
    """Order uint16 [chunk, rows, columns] as the lanes of a warp hold 16x16 of them."""
    chunks, rows, columns = values.shape
    # Rows are (16 rows, half, g), columns (step, half, t, pair).
    split = values.reshape(chunks, rows // 16, 2, 8, columns // 16, 2, 4, 2)
    ordered = split.transpose(0, 4, 1, 3, 6, 5, 2, 7)
    return np.ascontiguousarray(ordered).reshape(-1).view(np.uint32)


def from_fragments(words: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Undo `to_fragments`."""
    chunks = words.size * 2 // (rows * columns)
    ordered = words.view(np.uint16).reshape(chunks, columns // 16, rows // 16, 8, 4, 2, 2, 2)
    return ordered.transpose(0, 2, 6, 3, 1, 5, 4, 7).reshape(chunks, rows, columns)


def _compress(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep as many elements of every group of [chunk, rows, columns] as may be, and say which."""
    chunks, rows, columns = values.shape
    grouping = Grouping.of(values.dtype)
    groups = values.reshape(chunks, rows, columns // grouping.size, grouping.size)
    # A stable sort puts the nonzeros first; zeros are kept where there are too few.
    order = np.argsort(groups == 0, axis=3, kind="stable")
    places = np.sort(order[..., : grouping.most], axis=3)
    kept = np.take_along_axis(groups, places, axis=3).reshape(chunks, rows, -1)
    # In halves, two bits each: a float32 is halves 0 and 1, or 2 and 3.
    first, second = (places[..., 0] * 2, places[..., 0] * 2 + 1)
    if grouping.most == 2:
        first, second = places[..., 0], places[..., 1]
    codes = (first | second << 2).astype(np.uint32)
    # Rows are (16 rows, half, g), codes (step, half of the step, four of them).
    split = codes.reshape(chunks, rows // 16, 2, 8, -1, 2, 4)
    halves = (split << (4 * np.arange(4, dtype=np.uint32))).sum(axis=6, dtype=np.uint32)
    words = halves[:, :, 0] | halves[:, :, 1] << np.uint32(16)
    ordered = np.ascontiguousarray(words.transpose(0, 3, 1, 2, 4)).reshape(-1)
    return np.ascontiguousarray(kept).view(np.uint16), ordered.astype(np.uint32)


def _unpack_part(
    part: str, packed: PackedWeight, mt: int, kb: int, dtype: np.dtype[Any]
) -> np.ndarray:
    """Restore the elements [chunk, rows, columns of a chunk]."""
    words = packed.arrays[f"{part}_values"]
    halves = kb * dtype.itemsize // 2
    if part == "dense":
        return np.ascontiguousarray(from_fragments(words, mt, halves)).view(dtype)
    grouping = Grouping.of(dtype)
    kept = np.ascontiguousarray(from_fragments(words, mt, halves // 2)).view(dtype)
    chunks = len(kept)
    chosen = packed.arrays["sparse_chosen"].reshape(chunks, halves // 32, mt // 16, 8, 2)
    by_half = np.stack([chosen & 0xFFFF, chosen >> 16], axis=-1)
    # [chunk, step, 16 rows, g, half of the step, half of the rows] to [chunk, rows, half step].
    by_row = by_half.transpose(0, 2, 5, 3, 1, 4).reshape(chunks, mt, halves // 16)
    codes = (by_row[..., None] >> (4 * np.arange(4, dtype=np.uint32))) & 0xF
    places = np.stack([codes & 3, codes >> 2], axis=-1)
    places = places[..., : grouping.most] // (2 // grouping.most)
    restored = np.zeros((chunks, mt, kb // grouping.size, grouping.size), dtype)
    shape = (chunks, mt, kb // grouping.size, grouping.most)
    np.put_along_axis(restored, places.reshape(shape).astype(np.int64), kept.reshape(shape), axis=3)
    return restored.reshape(chunks, mt, kb)
