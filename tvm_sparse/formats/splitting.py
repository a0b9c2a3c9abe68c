"""What formats of row panels share: ranges of rows for threads, limits of their encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Match

# Columns inside a block are uint16, and one number behind the block means "none".
MAX_BLOCK = 65534


def check_panels(config: Mapping[str, Any], most_rows: int) -> Match:
    """Refuse panels, blocks and ranges that cannot be encoded."""
    if not 1 <= config["mr"] <= most_rows:
        return Match(False, f"panels of {config['mr']} rows; 1 to {most_rows} can be packed")
    if config.get("multiple", config["mr"]) % config["mr"]:
        return Match(False, "row ranges must end where panels end")
    if not 1 <= config["kb"] <= MAX_BLOCK:
        return Match(False, f"blocks of {config['kb']} columns; 1 to {MAX_BLOCK} can be packed")
    return Match(True)


def split_rows(weight: np.ndarray, parts: int, multiple: int) -> tuple[int, ...]:
    """Cut the rows into at most `parts` ranges of about equal nonzeros, at multiples of `multiple`.

    Returns the bounds, 0 and the number of rows among them.
    """
    rows = weight.shape[0]
    if parts <= 1:
        return (0, rows)
    done = np.cumsum(np.count_nonzero(weight, axis=1))
    targets = done[-1] * np.arange(1, parts) / parts
    cuts = np.searchsorted(done, targets) + 1
    inner = {round(float(cut) / multiple) * multiple for cut in cuts}
    return (0, *sorted(cut for cut in inner if 0 < cut < rows), rows)
