"""What is left of a weight whose channels were pruned: a smaller dense matrix, and where it goes.

Rows and input channels without a nonzero are left out; the kernel gathers the others and spreads
its results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix
from .dense_panels import DensePanels

# A vector of `before` may begin at the last row, and is followed by one that begins behind it.
MOST_LANES = 16


@dataclass(frozen=True)
class CompactChannels:
    """Panels of `mr` rows over the live rows and channels; a channel has `taps` columns.

    A weight of zeros keeps its first row and channel. The arrays of a packed weight [M, K], with R
    live rows and C live channels:

    - ``channels`` int32 [C]: the live channels, ascending;
    - ``rows`` int32 [M]: the live rows, ascending, then the others;
    - ``before`` int32 [M + MOST_LANES]: how many live rows come before each row, R behind the last;
    - ``values`` float32: what `DensePanels` makes of the [R, C * taps] that are left.
    """

    name: str = "compact_channels"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        taps = int(config.get("taps", 1))
        basic = check_matrix(weight)
        if basic and weight.shape[1] % taps:
            return Match(False, f"{weight.shape[1]} columns are no whole channels of {taps} taps")
        return basic

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        taps = int(config.get("taps", 1))
        rows, columns = weight.shape
        nonzero = weight != 0
        live = _never_empty(nonzero.any(axis=1))
        channels = np.flatnonzero(_never_empty(nonzero.any(axis=0).reshape(-1, taps).any(axis=1)))
        kept = weight.reshape(rows, -1, taps)[live][:, channels].reshape(live.sum(), -1)
        before = np.full(rows + MOST_LANES, live.sum(), np.int32)
        before[:rows] = np.cumsum(live) - live
        dense = DensePanels().pack(kept, {"mr": config["mr"]})
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": int(config["mr"]), "taps": taps, "rows": len(kept), "channels": len(channels)},
            {
                "channels": channels.astype(np.int32),
                "rows": np.argsort(~live, kind="stable").astype(np.int32),
                "before": before,
                "values": dense.arrays["values"],
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, taps = packed.config["rows"], packed.config["taps"]
        shape = (rows, packed.config["channels"] * taps)
        config = {"mr": packed.config["mr"], "groups": 1}
        values = {"values": packed.arrays["values"]}
        kept = DensePanels().unpack(PackedWeight("dense", shape, config, values))
        weight = np.zeros((packed.shape[0], packed.shape[1] // taps, taps), np.float32)
        live = packed.arrays["rows"][:rows]
        weight[live[:, None], packed.arrays["channels"]] = kept.reshape(rows, -1, taps)
        # A -0.0 that was packed comes back as 0.0.
        return weight.reshape(packed.shape) + np.float32(0)


def _never_empty(live: np.ndarray) -> np.ndarray:
    """Keep the first one where none is live: kernels multiply something."""
    return live if live.any() else np.arange(len(live)) == 0
