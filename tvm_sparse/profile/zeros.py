"""The weight that forms are looked for in: its counts, and its mask once something needs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .counts import Counts


@dataclass(frozen=True)
class Zeros:
    """A weight [rows, columns] and what one pass over it counted."""

    weight: np.ndarray
    counts: Counts

    @cached_property
    def mask(self) -> np.ndarray:
        """1 where the weight is not zero, 0 elsewhere; uint8 [rows, columns]."""
        return (self.weight != 0).view(np.uint8)
