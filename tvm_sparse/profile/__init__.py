"""What a pruned weight looks like: counts, and the forms that are recognised in its zeros.

NumPy only. A weight is seen as the matrix W[rows, columns] of output features by input features; a
convolution has the columns (input channel, tap), taps innermost. Zero means ``w == 0``: -0.0 is
zero, NaN and Inf are not.
"""

from ..findings import Finding
from .data import (
    BLOCK_SHAPES,
    NM_PATTERNS,
    TILE_HEIGHTS,
    TILE_RUN,
    BlockFit,
    CountStats,
    NMFit,
    SparsityProfile,
    TileFit,
)
from .weight import profile_weight

__all__ = [
    "BLOCK_SHAPES",
    "NM_PATTERNS",
    "TILE_HEIGHTS",
    "TILE_RUN",
    "BlockFit",
    "CountStats",
    "Finding",
    "NMFit",
    "SparsityProfile",
    "TileFit",
    "profile_weight",
]
