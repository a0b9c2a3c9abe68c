"""Tiles of rows in blocks of columns, for a GPU: one thread block takes a tile of rows.

A tile's rows are handed to its warps in turns from the fullest to the emptiest, and tiles are run
in that order too, so that warps and multiprocessors finish together (row swizzle: T. Gale et al.,
"Sparse GPU Kernels for Deep Learning", SC 2020, section V-A). Rows leave their tile never: its
results are consecutive in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix
from .order import PackedOrder
from .splitting import MAX_BLOCK

MAX_ROWS = 256

_MOST_STEP = 128


def rounded_most(nonzeros: float) -> int:
    """Round the nonzeros of a tile's fullest block up, so that layers of one shape agree."""
    return math.ceil(nonzeros / _MOST_STEP) * _MOST_STEP


@dataclass(frozen=True)
class RowTiles:
    """Compressed rows of tiles of `mt` rows in blocks of `kb` columns, `step` nonzeros at a time.

    The arrays of a packed weight, with T tiles and B blocks:

    - ``tiles`` int32 [T]: the tiles, the fullest first;
    - ``rows`` int32 [T * mt]: the matrix row of each slot; slots behind the last row hold
      rows >= M;
    - ``begins`` int32 [T * B * mt + 1]: where a slot's nonzeros begin, by tile, block and slot;
      the last one is their number;
    - ``columns`` uint16: columns inside the block; padding to `step` names a column that the row
      has, so that an infinity which the row does not read cannot reach it;
    - ``values`` float32: zero in padding.

    The packed config has `most`: the nonzeros of the fullest tile in a block, rounded up, so that
    layers of one shape share a kernel.
    """

    name: str = "row_tiles"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        mt, kb, step = (int(config[key]) for key in ("mt", "kb", "step"))
        if not 1 <= mt <= MAX_ROWS:
            return Match(False, f"tiles of {mt} rows; there can be 1 to {MAX_ROWS}")
        if not 1 <= kb <= MAX_BLOCK:
            return Match(False, f"blocks of {kb} columns; there can be 1 to {MAX_BLOCK}")
        if step < 1:
            return Match(False, f"steps of {step} nonzeros")
        return check_matrix(weight)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mt, kb, step = (int(config[key]) for key in ("mt", "kb", "step"))
        rows, columns = weight.shape
        tiles, blocks = -(-rows // mt), -(-columns // kb)
        padded = np.zeros((tiles * mt, blocks * kb), np.float32)
        padded[:rows, :columns] = weight
        nonzeros = np.count_nonzero(padded, axis=1).reshape(tiles, mt)
        order = np.argsort(-nonzeros, axis=1, kind="stable") + np.arange(tiles)[:, None] * mt
        # By tile, block, slot: [T, B, mt, kb].
        cells = padded[order].reshape(tiles, mt, blocks, kb).transpose(0, 2, 1, 3)
        flat = np.ascontiguousarray(cells).reshape(-1, kb)
        counts = np.count_nonzero(flat, axis=1)
        lengths = -(-counts // step) * step
        begins = np.concatenate([[0], np.cumsum(lengths)])
        piece, column = np.nonzero(flat)
        first = np.cumsum(counts) - counts
        place = begins[piece] + np.arange(len(piece)) - first[piece]
        values = np.zeros(begins[-1], np.float32)
        filled = counts > 0
        named = np.repeat(column[first[filled]], lengths[filled]).astype(np.uint16)
        values[place], named[place] = flat[piece, column], column
        by_group = lengths.reshape(tiles * blocks, mt).sum(1)
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mt": mt, "kb": kb, "step": step, "most": rounded_most(int(by_group.max()))},
            {
                "tiles": np.argsort(-nonzeros.sum(1), kind="stable").astype(np.int32),
                "rows": order.reshape(-1).astype(np.int32),
                "begins": begins.astype(np.int32),
                "columns": named,
                "values": values,
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mt, kb = packed.config["mt"], packed.config["kb"]
        tiles, blocks = -(-rows // mt), -(-columns // kb)
        lengths = np.diff(packed.arrays["begins"])
        piece = np.repeat(np.arange(lengths.size), lengths)
        tile, block, slot = np.unravel_index(piece, (tiles, blocks, mt))
        padded = np.zeros((tiles * mt, blocks * kb), np.float32)
        row = packed.arrays["rows"][tile * mt + slot]
        real = packed.arrays["values"] != 0
        column = block * kb + packed.arrays["columns"]
        padded[row[real], column[real]] = packed.arrays["values"][real]
        return padded[:rows, :columns]

    def order(self, packed: PackedWeight) -> PackedOrder:
        """Tell where rows and columns went."""
        return PackedOrder(packed.arrays["rows"][None], block=packed.config["kb"])
