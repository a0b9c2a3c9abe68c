"""The dense format: the same panels and blocks as the sparse one, with every column present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix


@dataclass(frozen=True)
class DensePanels:
    """Panels of `mr` rows: ``values`` float32 [groups, panels, columns, mr], then zeros.

    `groups` (1 unless a grouped convolution asks) divides the rows; each group has panels of its
    own.
    """

    name: str = "dense"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        basic = check_matrix(weight)
        if basic and weight.shape[0] % int(config.get("groups", 1)):
            return Match(
                False, f"{weight.shape[0]} rows do not divide into {config['groups']} groups"
            )
        return basic

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr, groups = int(config["mr"]), int(config.get("groups", 1))
        rows, columns = weight.shape
        panels = -(-(rows // groups) // mr)
        padded = np.zeros((groups, panels * mr, columns), np.float32)
        padded[:, : rows // groups] = weight.reshape(groups, rows // groups, columns)
        values = padded.reshape(groups, panels, mr, columns).transpose(0, 1, 3, 2)
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": mr, "groups": groups},
            {"values": np.ascontiguousarray(values).reshape(-1)},
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mr, groups = packed.config["mr"], packed.config["groups"]
        panels = packed.arrays["values"].reshape(groups, -1, columns, mr).transpose(0, 1, 3, 2)
        padded = panels.reshape(groups, -1, columns)
        return np.ascontiguousarray(padded[:, : rows // groups].reshape(rows, columns))

    def order(self, packed: PackedWeight) -> None:
        """Rows and columns are where they were."""
