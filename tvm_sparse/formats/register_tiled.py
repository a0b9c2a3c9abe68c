"""The register-tiled format: columns of a panel of rows, grouped by which of the rows they touch.

Rows are gathered in panels of `mr`. In every block of `kb` columns, a column's occupancy bitmask
over the panel's rows selects one of 2^mr - 1 short loops; columns with the same mask are stored
side by side, so that a loaded activation vector serves every row that needs it and no loop has a
branch inside (Sparse Register Tiling: L. Wilkinson, K. Cheshmi, M. M. Dehnavi, "Register Tiling for
Unstructured Sparsity in Neural Network Inference", PLDI 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix
from .clustering import cluster_rows
from .order import PackedOrder
from .splitting import check_panels, split_rows


@dataclass(frozen=True)
class RegisterTiled:
    """Panels of `mr` rows, blocks of `kb` columns, rows that share columns in one panel.

    `parts` cuts the rows into ranges of equal nonzeros at multiples of `multiple` (itself one of
    `mr`), for threads that share a panel of activations; rows are clustered inside their range
    only.

    The arrays of a packed weight, with P panels and B blocks:

    - ``counts`` uint16 [B * P * 2^mr]: columns of each mask;
    - ``column_at``, ``value_at`` int32 [B * P]: where a (block, panel) begins in the next two;
    - ``rows`` int32 [P * mr]: the matrix row of each panel slot; slots behind the last row hold
      rows >= M;
    - ``columns`` uint16 [C]: column inside its block;
    - ``values`` float32 [nnz]: for each column the values of its rows, in the order of the panel.
    """

    name: str = "register_tiled"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        return check_matrix(weight) and check_panels(config, most_rows=8)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr, kb = int(config["mr"]), int(config["kb"])
        rows, columns = weight.shape
        panels, blocks = -(-rows // mr), -(-columns // kb)
        bounds = split_rows(weight, int(config.get("parts", 1)), int(config.get("multiple", mr)))
        order = np.arange(rows, dtype=np.int32)
        if config.get("cluster", True) and mr > 1:
            order = np.concatenate(
                [low + cluster_rows(weight[low:high] != 0, mr) for low, high in pairwise(bounds)]
            )
        slots = np.concatenate([order, np.arange(rows, panels * mr, dtype=np.int32)])

        nonzero = np.zeros((panels * mr, columns), bool)
        np.not_equal(weight[order], 0, out=nonzero[:rows])
        nonzero = nonzero.reshape(panels, mr, columns)
        masks = np.zeros((panels, columns), np.uint8)
        for row in range(mr):
            masks |= nonzero[:, row].view(np.uint8) << row

        panel, column = np.nonzero(masks)
        mask, block = masks[panel, column], column // kb
        group = (block * panels + panel).astype(np.int64)
        sequence = np.lexsort((column, mask, group))
        panel, column, mask, group = (
            panel[sequence],
            column[sequence],
            mask[sequence],
            group[sequence],
        )

        counts = np.bincount((group << mr) + mask, minlength=(blocks * panels) << mr)
        used = (mask[:, None] >> np.arange(mr, dtype=np.uint8)) & 1 == 1
        entry, slot = np.nonzero(used)
        values = weight[slots[panel[entry] * mr + slot], column[entry]]

        columns_per_group = np.bincount(group, minlength=blocks * panels)
        values_per_group = np.bincount(group[entry], minlength=blocks * panels)
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": mr, "kb": kb, "cluster": bool(config.get("cluster", True)), "bounds": bounds},
            {
                "counts": counts.astype(np.uint16),
                "column_at": _starts(columns_per_group),
                "value_at": _starts(values_per_group),
                "rows": slots,
                "columns": (column % kb).astype(np.uint16),
                "values": values.astype(np.float32, copy=False),
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mr, kb = packed.config["mr"], packed.config["kb"]
        panels = -(-rows // mr)
        counts = packed.arrays["counts"].astype(np.int64)
        key = np.repeat(np.arange(counts.size), counts)
        group, mask = key >> mr, key & ((1 << mr) - 1)
        column = packed.arrays["columns"].astype(np.int64) + group // panels * kb
        entry, slot = np.nonzero((mask[:, None] >> np.arange(mr)) & 1)
        weight = np.zeros((panels * mr, columns), np.float32)
        row = packed.arrays["rows"][(group % panels)[entry] * mr + slot]
        weight[row, column[entry]] = packed.arrays["values"]
        return weight[:rows]

    def order(self, packed: PackedWeight) -> PackedOrder:
        """Tell where rows and columns went; inside a block they are sorted by masks, too."""
        return PackedOrder(packed.arrays["rows"][None], packed.config["mr"], packed.config["kb"])


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32)
