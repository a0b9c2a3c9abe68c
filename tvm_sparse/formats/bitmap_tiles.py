"""Bitmaps and nonzeros of tiles for tensor cores: loaded as sparse, multiplied as dense.

Where activations are few, a product takes as long as its weight's bytes take to come. So nonzeros
are held beside a bit for each element, and become fragments of dense tiles in registers (H. Xia et
al., "Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with
Unstructured Sparsity", VLDB 2023; bitmaps in the order of a fragment's lanes: R. Fan et al.,
"SpInfer: Leveraging Low-Level Sparsity for Efficient Large Language Model Inference on GPUs",
EuroSys 2025).

Counting bits is slow on a GPU: 16 lanes a cycle. A lane's eight elements of a fragment are
therefore neighbours in bitmap and values, and every eight lanes are told where theirs begin: one
count of 64 bits serves eight elements, and costs 1/32 of a byte an element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..dtypes import HALF_TYPES, numpy_dtype
from .base import Match, PackedWeight, check_matrix
from .order import PackedOrder, rows_as_they_are
from .tensor_tiles import LANES, MOST_ROWS, ROWS, from_fragments, step_columns, to_fragments

# Elements of a fragment, and of a lane of it; lanes whose bits are one map of 64.
STEP = step_columns("dense", "float16")
FRAGMENT = ROWS * STEP
LANE_ELEMENTS = FRAGMENT // LANES
GROUP_LANES = 8
GROUPS = LANES // GROUP_LANES
# Bytes that are copied as one.
PIECE_BYTES = 16
# Elements of a chunk: where values begin is said in 16 bits.
MOST_ELEMENTS = 1 << 16

_PIECE_VALUES = PIECE_BYTES // 2
_MOST_STEP = 128


def map_bytes(mt: int, kb: int) -> int:
    """Count the bytes of a chunk's bitmaps."""
    return mt * kb // 8


def header_bytes(mt: int, kb: int) -> int:
    """Count the bytes of a chunk before its values: bitmaps, and where those of each begin."""
    begins = 2 * GROUPS * (mt * kb // FRAGMENT)
    return map_bytes(mt, kb) + -(-begins // PIECE_BYTES) * PIECE_BYTES


def rounded_most(nonzeros: float) -> int:
    """Round the nonzeros of the fullest chunk up, so that layers of one shape agree."""
    return max(1, math.ceil(nonzeros / _MOST_STEP)) * _MOST_STEP


@dataclass(frozen=True)
class BitmapTiles:
    """Tiles of `mt` rows in chunks of `kb` columns; a chunk without a nonzero is left out.

    The arrays, with T tiles and C chunks:

    - ``tiles`` int32 [T]: the tiles, those with the most chunks first;
    - ``begins`` int32 [T + 1]: where a tile's chunks begin;
    - ``columns`` int32 [C]: a chunk's first column;
    - ``places`` int32 [C + 1]: where a chunk begins in `stream`, in pieces of 16 bytes;
    - ``stream`` uint32: chunk by chunk, fragments ordered by step, then by 16 rows:

      - bitmaps of 64 bits [fragment, 4]: byte j of map g is of lane 8g + j, its bit 2i + e of
        element e in register i, see `schedules.cuda.ptx.multiply`;
      - uint16 [fragment, 4]: the number of values of the chunk before those of a map;
      - the values that are not zero, in the order of their bits.

      Either of the last two is filled up to whole pieces.

    The packed config has `most`: values of the fullest chunk, rounded up, so that layers of one
    shape share a kernel.
    """

    name: str = "bitmap_tiles"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        mt, kb = int(config["mt"]), int(config["kb"])
        if mt % ROWS or not ROWS <= mt <= MOST_ROWS:
            return Match(False, f"tiles of {mt} rows; tensor cores take multiples of {ROWS}")
        if kb % STEP or kb < STEP:
            return Match(False, f"chunks of {kb} columns; tensor cores take multiples of 16")
        if mt * kb > MOST_ELEMENTS:
            return Match(False, f"chunks of {mt} x {kb} elements; {MOST_ELEMENTS} can be numbered")
        return check_matrix(weight, HALF_TYPES)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float16 or bfloat16 matrix [rows, columns]."""
        mt, kb = int(config["mt"]), int(config["kb"])
        rows, columns = weight.shape
        tiles = [_pack_tile(weight[first : first + mt], mt, kb) for first in range(0, rows, mt)]
        counts = [len(tile.columns) for tile in tiles]
        most = rounded_most(max(tile.most for tile in tiles))
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mt": mt, "kb": kb, "most": most, "dtype": str(weight.dtype)},
            {
                "tiles": np.argsort(-np.array(counts), kind="stable").astype(np.int32),
                "begins": _sums(counts),
                "columns": _not_empty([tile.columns for tile in tiles], 1),
                "places": _sums(np.concatenate([tile.sizes for tile in tiles])),
                "stream": _not_empty([tile.stream for tile in tiles], PIECE_BYTES // 4),
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mt, kb = packed.config["mt"], packed.config["kb"]
        begins, first_columns = packed.arrays["begins"], packed.arrays["columns"]
        tiles = len(begins) - 1
        restored = np.zeros((tiles * mt, -(-columns // kb) * kb), np.uint16)
        stream = packed.arrays["stream"].view(np.uint8)
        for chunk, place in enumerate(packed.arrays["places"][:-1]):
            row = mt * (int(np.searchsorted(begins, chunk, side="right")) - 1)
            column = first_columns[chunk]
            found = _unpack_chunk(stream[place * PIECE_BYTES :], mt, kb)
            restored[row : row + mt, column : column + kb] = found
        return restored[:rows, :columns].view(numpy_dtype(packed.config["dtype"]))

    def order(self, packed: PackedWeight) -> PackedOrder:
        """Tell where columns went: chunks without a nonzero are left out."""
        rows = rows_as_they_are(packed.shape[0])
        return PackedOrder(rows, together=packed.config["mt"], run=packed.config["kb"])


@dataclass(frozen=True)
class _Tile:
    """The chunks of a tile: first columns, sizes in pieces, words, and values of the fullest."""

    columns: np.ndarray
    sizes: np.ndarray
    stream: np.ndarray
    most: int


def _sums(counts: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _not_empty(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Join arrays; where there is nothing, some zeros that are never read."""
    joined = np.concatenate(parts)
    return joined if joined.size else np.zeros(length, joined.dtype)


def _pack_tile(rows: np.ndarray, mt: int, kb: int) -> _Tile:
    """Lay out some rows of the matrix, at most `mt`."""
    total = -(-rows.shape[1] // kb)
    padded = np.zeros((mt, total * kb), np.uint16)
    # A zero's bits are none, whatever its sign.
    bits = np.ascontiguousarray(rows).view(np.uint16)
    padded[: len(rows), : rows.shape[1]] = np.where(rows != 0, bits, np.uint16(0))
    by_chunk = np.ascontiguousarray(padded.reshape(mt, total, kb).transpose(1, 0, 2))
    filled = np.flatnonzero(by_chunk.any(axis=(1, 2)))
    cells = to_fragments(by_chunk[filled]).view(np.uint16).reshape(len(filled), mt * kb)
    mask = cells != 0
    counts = np.count_nonzero(mask, axis=1)
    header = header_bytes(mt, kb) // 2
    sizes = (header + counts + _PIECE_VALUES - 1) // _PIECE_VALUES
    places = np.cumsum(sizes) - sizes
    stream = np.zeros(int(sizes.sum()) * _PIECE_VALUES, np.uint16)
    heads = places[:, None] * _PIECE_VALUES + np.arange(header)
    stream[heads] = _headers(mask, mt, kb)
    # Values follow each other chunk by chunk; a chunk's own are moved to behind its header.
    moved = places * _PIECE_VALUES + header - (np.cumsum(counts) - counts)
    stream[np.arange(int(counts.sum())) + np.repeat(moved, counts)] = cells[mask]
    return _Tile(
        (filled * kb).astype(np.int32), sizes, stream.view(np.uint32), int(counts.max(initial=0))
    )


def _headers(mask: np.ndarray, mt: int, kb: int) -> np.ndarray:
    """Return the bitmaps and begins of chunks as uint16 [chunk, header]."""
    chunks = len(mask)
    maps = np.packbits(mask, axis=1, bitorder="little").view(np.uint16)
    bits = GROUP_LANES * LANE_ELEMENTS
    groups = mask.reshape(chunks, mt * kb // bits, bits).sum(axis=2)
    begins = np.cumsum(groups, axis=1) - groups
    headers = np.zeros((chunks, header_bytes(mt, kb) // 2), np.uint16)
    headers[:, : maps.shape[1]] = maps
    headers[:, maps.shape[1] : maps.shape[1] + begins.shape[1]] = begins
    return headers


def _unpack_chunk(stream: np.ndarray, mt: int, kb: int) -> np.ndarray:
    """Restore uint16 [mt, kb] from the bytes that a chunk begins."""
    mask = np.unpackbits(stream[: map_bytes(mt, kb)], bitorder="little").astype(bool)
    first = header_bytes(mt, kb)
    count = int(np.count_nonzero(mask))
    cells = np.zeros(mt * kb, np.uint16)
    cells[mask] = stream[first : first + 2 * count].view(np.uint16)
    return from_fragments(cells.view(np.uint32), mt, kb)[0]
