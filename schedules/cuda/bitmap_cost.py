"""What the kernel of bitmaps costs a GPU: events from elements and nonzeros, see `cost`.

Memory brings the packed weight once; L2 brings it for every tile of tokens, and the tokens for
every tile of rows. Each fragment is decoded by one warp, however many tokens it is multiplied by.
"""

from __future__ import annotations

import math

import numpy as np

from ...formats.bitmap_tiles import (
    FRAGMENT,
    LANE_ELEMENTS,
    PIECE_BYTES,
    STEP,
    header_bytes,
    rounded_most,
)
from ...profile import SparsityProfile
from ...targets import CudaMachine
from ...workload import Workload
from .bitmap_tiles import BitmapShape
from .cost import Events, columns_of, input_elements
from .tensor_cost import RESULT_INSTRUCTIONS, tensor_at_once
from .tensor_tiles import FRAGMENT_COLUMNS, FRAGMENT_ROWS
from .threads import WARP
from .token_rows import RUN

# Warp instructions that decode a fragment, and of a warp's chunk beside its fragments, as nvcc 13
# makes them.
_DECODE, _CHUNK_OVERHEAD = 44, 88
# Registers beside sums and fragments: nvcc finds more of them where it may, to decode ahead.
_OTHER_REGISTERS = 48
# Passes of shared memory to decode a fragment: a bitmap, a begin, and for each of a lane's elements
# as many as its values have in a bank, by density (counted by the tests' emulator).
_HEADER_READS = 2
_DENSITIES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)
_PASSES = (1.0, 1.06, 1.28, 1.58, 1.74, 1.91, 2.31, 4.0)


def bitmap_at_once(machine: CudaMachine, shape: BitmapShape) -> int:
    """Count the blocks that a multiprocessor holds at once; 0 when one does not fit."""
    return tensor_at_once(machine, shape, RUN, _OTHER_REGISTERS)


def expected_most(profile: SparsityProfile, mt: int, kb: int) -> int:
    """Guess how many nonzeros the fullest chunk has.

    Rows and columns of a random pattern differ little; where they differ more, so do chunks.
    """
    spread = 2 * max(profile.row_nnz.cv, profile.column_nnz.cv)
    mean = profile.density * mt * kb * (1 + min(1.0, spread))
    return rounded_most(min(mt * kb, mean + 4 * math.sqrt(mean)))


def packed_bytes(profile: SparsityProfile, shape: BitmapShape) -> float:
    """Count the bytes of the packed weight; no chunk is taken to be empty."""
    chunks = shape.tiles * math.ceil(shape.columns / shape.kb)
    return chunks * (header_bytes(shape.mt, shape.kb) + PIECE_BYTES / 2) + 2.0 * profile.nnz


def bitmap_events(
    workload: Workload, machine: CudaMachine, profile: SparsityProfile, shape: BitmapShape
) -> Events:
    """Count what a kernel does.

    Returns
    -------
    mapping
        As of `tensor_cost.tensor_events`, and ``in_flight``: bytes of memory that are on their way
        at a time.
    """
    chunks = shape.tiles * math.ceil(shape.columns / shape.kb)
    steps = chunks * shape.kb / STEP
    fragments = steps * shape.mt / FRAGMENT_ROWS
    grids = math.ceil(columns_of(workload) / shape.nt)
    packed = packed_bytes(profile, shape)
    loads = steps * shape.warps_m * shape.nt / FRAGMENT_COLUMNS
    tokens = 2.0 * steps * STEP * shape.nt
    results = columns_of(workload) * shape.rows / WARP
    staged = (packed + tokens) / 128
    decoded = _HEADER_READS + LANE_ELEMENTS * float(np.interp(profile.density, _DENSITIES, _PASSES))
    copies = (packed / PIECE_BYTES + tokens / (2 * RUN)) / WARP
    issue = fragments * (_DECODE + shape.nt / FRAGMENT_COLUMNS) + loads / 2 + 4 * copies
    issue += chunks * shape.warps * _CHUNK_OVERHEAD
    at_once = bitmap_at_once(machine, shape)
    blocks = shape.tiles * grids
    return {
        "tensor": fragments * FRAGMENT * shape.nt * grids,
        "shared": (fragments * decoded + 2 * loads + staged) * grids
        + (1 + shape.warps_k) * results,
        "issue": issue * grids + RESULT_INSTRUCTIONS * results,
        "l2_bytes": (packed + tokens) * grids,
        "bytes": packed + 2.0 * (input_elements(workload) + columns_of(workload) * shape.rows),
        "blocks": float(blocks),
        "at_once": float(at_once),
        "warps": float(shape.warps),
        "in_flight": packed
        / chunks
        * (shape.stages - 1)
        * min(blocks, at_once * machine.multiprocessors),
    }
