"""The weight as it is, row after row: for kernels with nothing to skip and nothing to reorder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix


@dataclass(frozen=True)
class Plain:
    """``values`` float32 [rows * columns]."""

    name: str = "plain"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed."""
        return check_matrix(weight)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Copy a float32 matrix [rows, columns]."""
        rows, columns = weight.shape
        values = np.array(weight, np.float32, order="C").reshape(-1)
        return PackedWeight(self.name, (rows, columns), {}, {"values": values})

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        return packed.arrays["values"].reshape(packed.shape).copy()

    def order(self, packed: PackedWeight) -> None:
        """Rows and columns are where they were."""
