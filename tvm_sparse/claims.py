"""Arrays of the size that a file claims: made where memory holds them, and refused where not."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def claimed_zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Make an array of zeros whose shape comes out of a file.

    Raises
    ------
    ValueError
        With the reason in words, when a size is negative or the whole is larger than the machine's
        memory.
    """
    check_claim(shape, np.dtype(dtype).itemsize)
    try:
        return np.zeros(tuple(shape), dtype)
    except MemoryError:
        raise ValueError(_too_large(shape)) from None


def check_claim(shape: Sequence[int], itemsize: int) -> None:
    """Refuse a shape that no array of this machine can have.

    The system would promise more memory than there is, and end the process when it is written.

    Raises
    ------
    ValueError
        As for `claimed_zeros`.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"the shape {list(shape)} has a negative size")
    # Sizes beside a zero count, too: NumPy multiplies them.
    if math.prod(max(size, 1) for size in shape) * itemsize > _memory_bytes():
        raise ValueError(_too_large(shape))


def _too_large(shape: Sequence[int]) -> str:
    return f"the shape {list(shape)} is more than this machine's memory holds"


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
