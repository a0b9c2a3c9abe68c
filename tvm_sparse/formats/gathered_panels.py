"""Panels of rows over the columns that they need: blocks, tiles and channels on processors.

In a panel of `mr` rows a column is held for all of them as soon as one has it, so that the inner
loop is that of a dense kernel over a list of columns. Blocks of R x C, R a multiple of `mr`, and
tiles of rows that share their columns are held without a zero; where patterns are only nearly so,
zeros are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix
from .order import PackedOrder
from .splitting import check_panels, split_rows

MOST_ROWS = 16


@dataclass(frozen=True)
class GatheredPanels:
    """Panels of `mr` rows in blocks of `kb` columns; rows without a nonzero come last.

    `parts` cuts the rows into ranges of about equal nonzeros at multiples of `multiple` (itself
    one of `mr`), for threads that share a panel of activations; rows stay in their range.

    The arrays of a packed weight, with P panels and B blocks:

    - ``lengths`` uint16 [B * P]: columns of a (block, panel);
    - ``column_at`` int32 [B * P]: where its columns begin;
    - ``rows`` int32 [P * mr]: the matrix row of each panel slot; slots behind the last row hold
      rows >= M;
    - ``columns`` uint16 [C]: column inside its block;
    - ``values`` float32 [C * mr]: for each column the values of all rows.
    """

    name: str = "gathered_panels"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        return check_matrix(weight) and check_panels(config, most_rows=MOST_ROWS)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr, kb = int(config["mr"]), int(config["kb"])
        rows, columns = weight.shape
        panels, blocks = -(-rows // mr), -(-columns // kb)
        bounds = split_rows(weight, int(config.get("parts", 1)), int(config.get("multiple", mr)))
        filled = np.any(weight != 0, axis=1)
        order = np.concatenate([_filled_first(filled, low, high) for low, high in pairwise(bounds)])
        slots = np.concatenate([order, np.arange(rows, panels * mr)]).astype(np.int32)

        padded = np.zeros((panels * mr, columns), np.float32)
        padded[:rows] = weight[order]
        held = padded.reshape(panels, mr, columns)
        panel, column = np.nonzero(np.any(held != 0, axis=1))
        piece = (column // kb) * panels + panel
        sequence = np.lexsort((column, piece))
        panel, column, piece = panel[sequence], column[sequence], piece[sequence]
        lengths = np.bincount(piece, minlength=blocks * panels)
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": mr, "kb": kb, "bounds": bounds},
            {
                "lengths": lengths.astype(np.uint16),
                "column_at": (np.cumsum(lengths) - lengths).astype(np.int32),
                "rows": slots,
                "columns": (column % kb).astype(np.uint16),
                "values": np.ascontiguousarray(held[panel, :, column]).reshape(-1),
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mr, kb = packed.config["mr"], packed.config["kb"]
        panels = -(-rows // mr)
        lengths = packed.arrays["lengths"].astype(np.int64)
        piece = np.repeat(np.arange(lengths.size), lengths)
        column = packed.arrays["columns"].astype(np.int64) + piece // panels * kb
        slots = (piece % panels)[:, None] * mr + np.arange(mr)
        weight = np.zeros((panels * mr, columns), np.float32)
        weight[packed.arrays["rows"][slots], column[:, None]] = packed.arrays["values"].reshape(
            -1, mr
        )
        return weight[:rows]

    def order(self, packed: PackedWeight) -> PackedOrder:
        """Tell where rows and columns went."""
        return PackedOrder(packed.arrays["rows"][None], packed.config["mr"], packed.config["kb"])


def _filled_first(filled: np.ndarray, low: int, high: int) -> np.ndarray:
    """Order the rows of a range: those with a nonzero, then the others."""
    rows = np.arange(low, high)
    return np.concatenate([rows[filled[low:high]], rows[~filled[low:high]]])
