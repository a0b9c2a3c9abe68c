"""Sliced ELLPACK by blocks of columns: rows of equal length side by side, so that loops are even.

In every block of `kb` columns the rows are sorted by their nonzeros in that block and cut in slices
of `mr` rows, each padded to its longest row (SELL-C-sigma: M. Kreutzer et al., "A Unified Sparse
Matrix Data Format for Efficient General Sparse Matrix-Vector Multiplication on Modern Processors
with Wide SIMD Units", SIAM J. Sci. Comput. 36(5), 2014). Neighbouring slices have the same length,
so the processor foresees where their loops end: in a network, where every layer brings other
weights, mispredicted loop ends cost the masks of the register-tiled format as much as its
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix
from .splitting import check_panels, split_rows


@dataclass(frozen=True)
class SlicedEll:
    """Slices of `mr` rows in blocks of `kb` columns.

    `parts` and `multiple` cut the rows into ranges for threads, as in `RegisterTiled`; rows are
    sorted inside their range.

    The arrays of a packed weight, with S slices and B blocks:

    - ``lengths`` uint16 [B * S]: columns of each slice;
    - ``starts`` int32 [B * S]: where a slice begins in `columns` and, times `mr`, in `values`;
    - ``rows`` int32 [B * S * mr]: the matrix row of each slot; slots behind the last row hold
      rows >= M;
    - ``columns`` uint16 [entries * mr]: columns inside the block, slot by slot; padding names
      column `kb`, which the kernel keeps at zero;
    - ``values`` float32 [entries * mr].
    """

    name: str = "sliced_ell"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        return check_matrix(weight) and check_panels(config, most_rows=16)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr, kb = int(config["mr"]), int(config["kb"])
        rows, columns = weight.shape
        bounds = split_rows(weight, int(config.get("parts", 1)), int(config.get("multiple", mr)))
        blocks, slots = -(-columns // kb), -(-rows // mr) * mr

        row, column = np.nonzero(weight)
        block = column // kb
        counts = np.bincount(block * slots + row, minlength=blocks * slots).reshape(blocks, slots)
        order = np.concatenate(
            [
                low + np.argsort(-counts[:, low : _end(high, rows, slots)], axis=1, kind="stable")
                for low, high in pairwise(bounds)
            ],
            axis=1,
        )
        ordered = np.take_along_axis(counts, order, axis=1)
        lengths = ordered.reshape(blocks, -1, mr).max(axis=2).reshape(-1)
        starts = np.concatenate([[0], np.cumsum(lengths)])

        # Where each nonzero goes: its rank in its row and block, at its row's slot.
        slot_of = np.empty_like(order)
        np.put_along_axis(slot_of, order, np.arange(slots)[None, :].repeat(blocks, 0), axis=1)
        key = np.lexsort((column, row, block))
        row, column, block = row[key], column[key], block[key]
        group = block * slots + row
        first = np.concatenate([[0], np.cumsum(counts.reshape(-1))])[group]
        rank = np.arange(len(row)) - first
        slot = slot_of[block, row]
        place = (starts[block * (slots // mr) + slot // mr] + rank) * mr + slot % mr

        packed_columns = np.full(starts[-1] * mr, kb, np.uint16)
        packed_values = np.zeros(starts[-1] * mr, np.float32)
        packed_columns[place] = column % kb
        packed_values[place] = weight[row, column]
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": mr, "kb": kb, "bounds": bounds},
            {
                "lengths": lengths.astype(np.uint16),
                "starts": starts[:-1].astype(np.int32),
                "rows": order.astype(np.int32).reshape(-1),
                "columns": packed_columns,
                "values": packed_values,
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mr, kb = packed.config["mr"], packed.config["kb"]
        slices = -(-rows // mr)
        lengths = packed.arrays["lengths"].astype(np.int64)
        piece = np.repeat(np.arange(lengths.size), lengths * mr)
        slot = np.tile(np.arange(mr), int(lengths.sum()))
        inside = packed.arrays["columns"].astype(np.int64)
        row = packed.arrays["rows"][piece * mr + slot]
        real = inside < kb
        weight = np.zeros((slices * mr, columns), np.float32)
        column = inside + piece // slices * kb
        weight[row[real], column[real]] = packed.arrays["values"][real]
        return weight[:rows]


def _end(high: int, rows: int, slots: int) -> int:
    """Give the last range the slots behind the last row."""
    return slots if high == rows else high
