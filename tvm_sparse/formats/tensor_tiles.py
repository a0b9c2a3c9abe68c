"""Tiles of rows over gathered columns, for tensor cores: dense, two of four, or one of each.

Every tile of rows lists the columns that it needs; activations are gathered by the list, so inside
the tile the product is dense (tile-wise sparsity: C. Guo et al., "Accelerating Sparse DNN Models
without Hardware-Support via Tile-Wise Sparsity", SC 2020, section IV). Blocks, vectors and whole
channels are special cases.

As the list is free, it can also be arranged so that no row has more than two nonzeros in any four
of its columns, which sparse tensor cores want: a 2:4 weight needs its own columns; V:N:M (R. Castro
et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", SC 2023)
those that a tile chose; any other weight some columns twice, each time with other elements of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import HALF_TYPES, numpy_dtype
from .base import Match, PackedWeight, check_matrix

ROWS = 16
MOST_ROWS = 256
# Columns that one instruction multiplies by.
DENSE_STEP, SPARSE_STEP = 16, 32
# Columns that may be fetched as one, and one.
RUNS = (1, 8)
LANES = 32
# Groups of four that wait for their next column at a time.
_OPEN = 16


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
      [chunk, step, rows / 16, lane, 4];
    - ``chosen`` uint32 [chunk, step, rows / 16, 16], of two of four only: word 2g + h of 16 rows
      says which of columns 16 h to 16 h + 15 row g keeps in its low half, row g + 8 in its high
      half.

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
        step = SPARSE_STEP if self.sparse else DENSE_STEP
        if mt % ROWS or not ROWS <= mt <= MOST_ROWS:
            return Match(False, f"tiles of {mt} rows; tensor cores take multiples of {ROWS}")
        if kb % step or kb < step:
            return Match(False, f"chunks of {kb} columns; tensor cores take multiples of {step}")
        if run not in RUNS:
            return Match(False, f"runs of {run} columns; there can be {RUNS[0]} or {RUNS[1]}")
        fits = check_matrix(weight, HALF_TYPES)
        if fits and weight.shape[1] % run:
            return Match(False, f"{weight.shape[1]} columns are not whole runs of {run}")
        return fits

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float16 or bfloat16 matrix [rows, columns]."""
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
        slots = packed.arrays["rows"]
        words = np.zeros((len(slots), columns), np.uint16)
        for part in self.parts:
            begins = packed.arrays[f"{part}_begins"]
            firsts = packed.arrays[f"{part}_columns"].reshape(-1, kb // run)
            named = (firsts[..., None] + np.arange(run)).reshape(len(firsts), kb)
            held = _unpack_part(part, packed, mt, kb)
            for tile in range(len(begins) - 1):
                own = words[tile * mt : (tile + 1) * mt]
                for chunk in range(begins[tile], begins[tile + 1]):
                    row, place = np.nonzero(held[chunk])
                    own[row, named[chunk, place]] = held[chunk][row, place]
        restored = np.zeros((rows, columns), np.uint16)
        real = slots < rows
        restored[slots[real]] = words[real]
        return restored.view(numpy_dtype(packed.config["dtype"]))


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
    """Arrange a tile so that no row has more than two nonzeros in any four columns.

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
    if run > 1:
        return _rounds(columns, tile)
    mask = tile != 0
    at_fours = _fours(columns, mask)
    if at_fours is not None:
        kept, held = at_fours
        return columns[kept], np.where(held, tile[:, kept], tile.dtype.type(0))
    listed, masks = _fill_groups(mask)
    held_there = np.where(masks, tile[:, listed], tile.dtype.type(0))
    return columns[listed], held_there


def holds_two_of_four(mask: np.ndarray) -> bool:
    """Tell whether the columns that a tile needs are two of four as they follow each other.

    Parameters
    ----------
    mask : numpy.ndarray
        Which elements of the tile [rows, columns] are not zero.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    return len(columns) == 0 or _fours(columns, mask[:, columns]) is not None


def _fours(columns: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the columns as they stand if each four of them are fit, by place or by number."""
    for groups in (np.arange(len(columns)) // 4, columns // 4):
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        counts = np.add.reduceat(mask, starts, axis=1, dtype=np.int64)
        if counts.max(initial=0) > 2:
            continue
        sizes = np.diff(np.append(starts, len(columns)))
        is_real = np.arange(4) < sizes[:, None]
        # Groups that lack columns name their first one again, for nothing.
        places = np.where(is_real, starts[:, None] + np.arange(4), starts[:, None]).reshape(-1)
        return places, mask[:, places] & is_real.reshape(-1)
    return None


def _rounds(columns: np.ndarray, tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List runs again as long as some four of their columns hold more than two."""
    listed, held = [], []
    left = tile.copy()
    while len(columns):
        fours = (left != 0).reshape(len(left), -1, 4)
        now = (np.cumsum(fours, axis=2) <= 2).reshape(left.shape)
        listed.append(columns)
        held.append(np.where(now, left, left.dtype.type(0)))
        left = np.where(now, left.dtype.type(0), left)
        kept = _whole_runs(np.any(left != 0, axis=0), RUNS[1])
        columns, left = columns[kept], left[:, kept]
    return np.concatenate(listed), np.concatenate(held, axis=1)


def _fill_groups(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deal columns to groups of four, first fit; what no group takes of one is dealt again.

    Returns the column of each place, and which rows hold their element there.
    """
    rows = len(mask)
    groups: list[list[tuple[int, np.ndarray]]] = []
    full: list[list[tuple[int, np.ndarray]]] = []
    counts = np.zeros((0, rows), np.int8)
    waiting = [(column, mask[:, column]) for column in range(mask.shape[1])]
    while waiting:
        column, wanted = waiting.pop()
        fits = np.flatnonzero(np.all(counts + wanted <= 2, axis=1))
        if len(fits):
            number, taken = int(fits[0]), wanted
        elif len(groups) < _OPEN:
            groups.append([])
            counts = np.concatenate([counts, np.zeros((1, rows), np.int8)])
            number, taken = len(groups) - 1, wanted
        else:
            free = (counts < 2) & wanted
            number = int(np.argmax(free.sum(axis=1)))
            taken = free[number]
            waiting.append((column, wanted & ~taken))
        groups[number].append((column, taken))
        counts[number] += taken
        if len(groups[number]) == 4:
            full.append(groups.pop(number))
            counts = np.delete(counts, number, axis=0)
    return _listed([*full, *groups], rows)


def _listed(
    groups: Sequence[list[tuple[int, np.ndarray]]], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.zeros(rows, bool)
    places = [p for group in groups for p in group + [(group[0][0], nothing)] * (4 - len(group))]
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
    """Keep two elements of every four of [chunk, rows, columns], and say which."""
    chunks, rows, columns = values.shape
    fours = values.reshape(chunks, rows, columns // 4, 4)
    # A stable sort puts the nonzeros first; two of four are kept, zeros where there are not two.
    places = np.sort(np.argsort(fours == 0, axis=3, kind="stable")[..., :2], axis=3)
    kept = np.take_along_axis(fours, places, axis=3).reshape(chunks, rows, columns // 2)
    codes = (places[..., 0] | places[..., 1] << 2).astype(np.uint32)
    # Rows are (16 rows, half, g), codes (step, half of the step's columns, four of them).
    split = codes.reshape(chunks, rows // 16, 2, 8, columns // 32, 2, 4)
    halves = (split << (4 * np.arange(4, dtype=np.uint32))).sum(axis=6, dtype=np.uint32)
    words = halves[:, :, 0] | halves[:, :, 1] << np.uint32(16)
    ordered = np.ascontiguousarray(words.transpose(0, 3, 1, 2, 4)).reshape(-1)
    return np.ascontiguousarray(kept).view(np.uint16), ordered.astype(np.uint32)


def _unpack_part(part: str, packed: PackedWeight, mt: int, kb: int) -> np.ndarray:
    """Restore uint16 [chunk, rows, columns of a chunk]."""
    words = packed.arrays[f"{part}_values"]
    if part == "dense":
        return from_fragments(words, mt, kb)
    kept = from_fragments(words, mt, kb // 2)
    chunks = len(kept)
    chosen = packed.arrays["sparse_chosen"].reshape(chunks, kb // 32, mt // 16, 8, 2)
    halves = np.stack([chosen & 0xFFFF, chosen >> 16], axis=-1)
    # [chunk, step, 16 rows, g, half of columns, half of rows] to [chunk, rows, 16 columns].
    by_row = halves.transpose(0, 2, 5, 3, 1, 4).reshape(chunks, mt, kb // 16)
    codes = (by_row[..., None] >> (4 * np.arange(4, dtype=np.uint32))) & 0xF
    places = np.stack([codes & 3, codes >> 2], axis=-1).reshape(chunks, mt, kb // 4, 2)
    restored = np.zeros((chunks, mt, kb // 4, 4), np.uint16)
    pairs = kept.reshape(chunks, mt, kb // 4, 2)
    np.put_along_axis(restored, places.astype(np.int64), pairs, axis=3)
    return restored.reshape(chunks, mt, kb)
