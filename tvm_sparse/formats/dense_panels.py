"""The dense format: the same panels and blocks as the sparse one, with every column present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix


@dataclass(frozen=True)
class DensePanels:
    """Panels of `mr` rows: ``values`` float32 [ceil(rows / mr), columns, mr], zeros behind the last row."""

    name: str = "dense"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        return check_matrix(weight)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr = int(config["mr"])
        rows, columns = weight.shape
        panels = -(-rows // mr)
        padded = np.zeros((panels * mr, columns), np.float32)
        padded[:rows] = weight
        values = np.ascontiguousarray(padded.reshape(panels, mr, columns).transpose(0, 2, 1))
        return PackedWeight(
            self.name, (rows, columns), {"mr": mr}, {"values": values.reshape(-1)}
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        values = packed.arrays["values"].reshape(-1, columns, packed.config["mr"])
        return np.ascontiguousarray(values.transpose(0, 2, 1).reshape(-1, columns)[:rows])
