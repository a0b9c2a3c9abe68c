"""Sliced ELLPACK by blocks of columns: rows of equal length side by side, so that loops are even.

In every block of `kb` columns the rows are sorted by their nonzeros in that block and cut in slices
of `mr` rows, each padded to its longest row (SELL-C-sigma: M. Kreutzer et al., "A Unified Sparse
Matrix Data Format for Efficient General Sparse Matrix-Vector Multiplication on Modern Processors
with Wide SIMD Units", SIAM J. Sci. Comput. 36(5), 2014). Neighbouring slices have the same length,
so the processor foresees where their loops end: in a network, where every layer brings other
weights, mispredicted loop ends cost the masks of the register-tiled format as much as its
arithmetic.

With `share` = 2, rows that have many columns in common are paired, within what the sorting leaves
open, and a slice begins with steps in which each pair multiplies one column: a loaded vector of
activations then serves two rows, as the masks of the register-tiled format have it, in two loops
instead of fifteen. Every step, shared or not, takes one nonzero of each row, so that sharing does
not change how far rows are padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Match, PackedWeight, check_matrix
from .clustering import pair_rows
from .order import PackedOrder
from .splitting import MAX_BLOCK, check_panels, split_rows


@dataclass(frozen=True)
class SlicedEll:
    """Slices of `mr` rows in blocks of `kb` columns, whose rows share columns by `share`.

    `parts` and `multiple` cut the rows into ranges for threads, as in `RegisterTiled`; rows are
    sorted inside their range.

    The arrays of a packed weight, with S slices, B blocks and L loops a slice (two when rows share,
    else one):

    - ``lengths`` uint16 [B * S * L]: steps of each loop, the shared one first;
    - ``column_at``, ``value_at`` int32 [B * S]: where a slice begins in `columns` and `values`;
    - ``rows`` int32 [B * S * mr]: the matrix row of each slot; slots behind the last row hold
      rows >= M;
    - ``columns`` uint16: columns inside the block; a step of the shared loop has `mr` / `share`,
      one of the last loop `mr`; padding names the column behind the block (`zeros_behind` =
      "block") or behind the whole matrix ("matrix"), which the kernel keeps at zero;
    - ``values`` float32: `mr` a step, slot by slot.
    """

    name: str = "sliced_ell"

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` can be packed with `config`."""
        mr, share = config["mr"], config.get("share", 1)
        if share not in (1, 2) or mr % share:
            return Match(
                False, f"{share} of {mr} rows cannot share a column; 1 or 2 that divide it"
            )
        if _pads_behind_matrix(config) and weight.shape[1] > MAX_BLOCK:
            return Match(False, f"{weight.shape[1]} columns; padding behind them has no number")
        return check_matrix(weight) and check_panels(config, most_rows=16)

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a float32 matrix [rows, columns]."""
        mr, kb, share = int(config["mr"]), int(config["kb"]), int(config.get("share", 1))
        rows, columns = weight.shape
        bounds = split_rows(weight, int(config.get("parts", 1)), int(config.get("multiple", mr)))
        padded = np.zeros((-(-rows // mr) * mr, columns), np.float32)
        padded[:rows] = weight
        blocks = [
            _pack_block(
                padded[:, first : first + kb],
                bounds,
                mr,
                share,
                columns - first if _pads_behind_matrix(config) else kb,
            )
            for first in range(0, columns, kb)
        ]
        lengths = np.concatenate([block.lengths for block in blocks])
        columns_of = lengths @ _columns_per_step(mr, share)
        values_of = lengths.sum(1) * mr
        return PackedWeight(
            self.name,
            (rows, columns),
            {"mr": mr, "kb": kb, "share": share, "bounds": bounds},
            {
                "lengths": lengths.astype(np.uint16).reshape(-1),
                "column_at": (np.cumsum(columns_of) - columns_of).astype(np.int32),
                "value_at": (np.cumsum(values_of) - values_of).astype(np.int32),
                "rows": np.concatenate([block.order for block in blocks]).astype(np.int32),
                "columns": np.concatenate([block.columns for block in blocks]),
                "values": np.concatenate([block.values for block in blocks]),
            },
        )

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix."""
        rows, columns = packed.shape
        mr, kb, share = (packed.config[key] for key in ("mr", "kb", "share"))
        per_step = _columns_per_step(mr, share)
        loops = len(per_step)
        lengths = packed.arrays["lengths"].astype(np.int64)
        slices = -(-rows // mr)
        step_loop = np.repeat(np.arange(lengths.size) % loops, lengths)
        step_piece = np.repeat(np.arange(lengths.size) // loops, lengths)
        # Each value's column: slots of a step that share one read the same entry.
        first_column = np.cumsum(per_step[step_loop]) - per_step[step_loop]
        slot = np.arange(mr)
        entry = first_column[:, None] + slot * per_step[step_loop][:, None] // mr
        inside = packed.arrays["columns"][entry].astype(np.int64).reshape(-1)
        row = packed.arrays["rows"].reshape(-1, mr)[step_piece].reshape(-1)
        column = inside + np.repeat(step_piece // slices, mr) * kb
        real = (inside < kb) & (column < columns)
        weight = np.zeros((slices * mr, columns), np.float32)
        weight[row[real], column[real]] = packed.arrays["values"][real]
        return weight[:rows]

    def order(self, packed: PackedWeight) -> PackedOrder:
        """Tell where rows and columns went: every block has its rows in an order of its own."""
        slots = -(-packed.shape[0] // packed.config["mr"]) * packed.config["mr"]
        return PackedOrder(packed.arrays["rows"].reshape(-1, slots), block=packed.config["kb"])


@dataclass(frozen=True)
class _Block:
    """One block of columns: the order of its rows, and its slices one behind the other."""

    order: np.ndarray
    lengths: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def _pads_behind_matrix(config: Mapping[str, Any]) -> bool:
    return config.get("zeros_behind", "block") == "matrix"


def _columns_per_step(mr: int, share: int) -> np.ndarray:
    """Columns that one step of each loop reads."""
    return np.array([mr] if share == 1 else [mr // share, mr])


def _pack_block(
    weight: np.ndarray, bounds: tuple[int, ...], mr: int, share: int, padding: int
) -> _Block:
    """Sort, slice and lay out one block of columns; `padding` is what padded entries name."""
    nonzero = weight != 0
    order = _order_rows(nonzero, bounds, share)
    nonzero, weight = nonzero[order], weight[order]
    slices = len(order) // mr
    longest = nonzero.sum(1).reshape(slices, mr).max(1)
    if share == 1:
        lengths = longest[:, None]
        parts = [_lone_steps(nonzero, lengths[:, 0], mr)]
    else:
        common = nonzero.reshape(-1, share, nonzero.shape[1]).all(1)
        steps = common.sum(1).reshape(slices, mr // share).min(1)
        rank = np.cumsum(common, 1)
        common &= rank <= np.repeat(steps, mr // share)[:, None]
        lone = nonzero & ~np.repeat(common, share, 0)
        lengths = np.stack([steps, longest - steps], 1)
        parts = [_shared_steps(common, steps, mr, share), _lone_steps(lone, lengths[:, 1], mr)]
    return _lay_out(weight, order, lengths, parts, padding)


@dataclass(frozen=True)
class _Steps:
    """The steps of one loop over all slices: columns [steps, groups], -1 where padded."""

    columns: np.ndarray
    share: int


def _shared_steps(common: np.ndarray, steps: np.ndarray, mr: int, share: int) -> _Steps:
    return _Steps(_grid(common, steps, mr // share), share)


def _lone_steps(nonzero: np.ndarray, steps: np.ndarray, mr: int) -> _Steps:
    return _Steps(_grid(nonzero, steps, mr), 1)


def _grid(chosen: np.ndarray, steps: np.ndarray, groups: int) -> np.ndarray:
    """Write the chosen columns of every group of rows below each other, slice by slice."""
    starts = np.cumsum(steps) - steps
    row, column = np.nonzero(chosen)
    counts = chosen.sum(1)
    rank = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    grid = np.full((int(steps.sum()), groups), -1, np.int64)
    grid[starts[row // groups] + rank, row % groups] = column
    return grid


def _lay_out(
    weight: np.ndarray, order: np.ndarray, lengths: np.ndarray, parts: list[_Steps], padding: int
) -> _Block:
    """Put the loops of each slice behind each other."""
    slices = len(lengths)
    mr = len(order) // slices
    columns, values, keys = [], [], []
    for loop, part in enumerate(parts):
        piece = np.repeat(np.arange(slices), lengths[:, loop])
        slot_columns = np.repeat(part.columns, part.share, 1)
        rows = piece[:, None] * mr + np.arange(mr)
        values.append(np.where(slot_columns < 0, np.float32(0), weight[rows, slot_columns]))
        columns.append(np.where(part.columns < 0, padding, part.columns).astype(np.uint16))
        keys.append(piece * len(parts) + loop)
    sequence = np.argsort(np.concatenate(keys), kind="stable")
    widths = np.concatenate([np.full(len(c), c.shape[1]) for c in columns])
    flat = np.concatenate([c.reshape(-1) for c in columns])
    starts = np.cumsum(widths) - widths
    taken = np.repeat(starts[sequence], widths[sequence]) + _ranks(widths[sequence])
    return _Block(
        order=order,
        lengths=lengths,
        columns=flat[taken],
        values=np.concatenate(values)[sequence].reshape(-1).astype(np.float32, copy=False),
    )


def _ranks(counts: np.ndarray) -> np.ndarray:
    """Count 0 .. counts[i] - 1 for every i, one behind the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _order_rows(nonzero: np.ndarray, bounds: tuple[int, ...], share: int) -> np.ndarray:
    """Sort the rows of every range by their nonzeros; pairs that share columns stay together."""
    slots = len(nonzero)
    ends = [*bounds[1:-1], slots]
    orders = []
    for low, high in zip(bounds, ends, strict=False):
        part = nonzero[low:high]
        if share == 2:
            orders.append(low + pair_rows(part))
        else:
            orders.append(low + np.argsort(-part.sum(1), kind="stable"))
    return np.concatenate(orders)
