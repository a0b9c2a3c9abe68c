"""Draw spy plots of weights, as they are and in a format's order."""

from __future__ import annotations

import numpy as np

from ..spy import LEVELS, Spy, cells_of
from .order import PackedOrder


def spy(weight: np.ndarray, most: int) -> Spy:
    """Draw a matrix as it is.

    Parameters
    ----------
    weight : numpy.ndarray
        [rows, columns], both at least one.
    most : int
        Cells, at most.
    """
    rows, columns = weight.shape
    height, width = cells_of(rows, columns, most)
    row_ends, firsts = _firsts(rows, height), _firsts(columns, width)[:-1]
    counts = np.empty((height, width), np.int64)
    for cell in range(height):
        filled = np.count_nonzero(weight[row_ends[cell] : row_ends[cell + 1]], axis=0)
        counts[cell] = np.add.reduceat(filled, firsts)
    return _drawn(counts, rows, columns)


def packed_spy(weight: np.ndarray, order: PackedOrder, most: int) -> Spy:
    """Draw a matrix in the order of a format: held columns at the left, padding at the bottom.

    Parameters
    ----------
    weight : numpy.ndarray
        [rows, columns], the matrix that was packed.
    order : PackedOrder
        Of the format.
    most : int
        Cells, at most.
    """
    slots, columns = order.rows.shape[1], weight.shape[1]
    height, width = cells_of(slots, columns, most)
    cell_of_slot = _cell_of_each(slots, height) * width
    cell_of_place = _cell_of_each(columns, width)
    counts = np.zeros(height * width, np.int64)
    for slot, place in order.nonzeros(weight):
        cells = cell_of_slot[slot] + cell_of_place[place]
        counts += np.bincount(cells, minlength=height * width)
    return _drawn(counts.reshape(height, width), slots, columns)


def _firsts(elements: int, cells: int) -> np.ndarray:
    """Cut elements evenly: where each cell begins, and where the last one ends."""
    return np.arange(cells + 1) * elements // cells


def _cell_of_each(elements: int, cells: int) -> np.ndarray:
    return np.repeat(np.arange(cells), np.diff(_firsts(elements, cells)))


def _drawn(counts: np.ndarray, rows: int, columns: int) -> Spy:
    height, width = counts.shape
    sizes = np.outer(np.diff(_firsts(rows, height)), np.diff(_firsts(columns, width)))
    density = counts / sizes
    densest = float(density.max())
    # By the root, so that a few nonzeros are seen beside many.
    levels = np.rint((LEVELS - 1) * np.sqrt(density / (densest or 1.0)))
    levels = np.where(counts > 0, np.maximum(levels, 1), 0).astype(np.uint8)
    return Spy.of(height, width, densest, levels.tobytes())
