"""Activations in panels: how kernels that follow each other pass them on, untransposed.

A panel holds some vectors of tokens side by side, feature by feature, and a row of zeros behind the
last feature: [features + 1][width]. Panels follow each other in one flat tensor. Their widths are
those that the register tile takes, so that a panel is a contiguous piece of memory for every layer,
and every operation over features runs down the columns of vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tiles:
    """Panels of activations: `full` of width `nt` vectors, then `rest` of `nt_rest` vectors."""

    nt: int
    full: int
    nt_rest: int
    rest: int

    @property
    def total(self) -> int:
        """Number of panels."""
        return self.full + self.rest


def split_evenly(columns: int, nt: int, lanes: int) -> Tiles:
    """Cover `columns` by as few panels of at most `nt` vectors as it takes, evenly.

    A narrow panel costs nearly as much as a wide one, and threads get equal work.
    """
    vectors = -(-columns // lanes)
    panels = max(1, -(-vectors // nt))
    narrow, wider = divmod(vectors, panels)
    if not wider:
        return Tiles(narrow, panels, narrow, 0)
    return Tiles(narrow + 1, wider, narrow, panels - wider)


@dataclass(frozen=True)
class Panels:
    """How the activations of `tokens` tokens are cut: panels of at most `nt` vectors of `lanes`."""

    tokens: int
    nt: int
    lanes: int

    @property
    def tiles(self) -> Tiles:
        """The panels' widths."""
        return split_evenly(self.tokens, self.nt, self.lanes)

    @property
    def columns(self) -> int:
        """Tokens, with those that fill the last vector."""
        return -(-self.tokens // self.lanes) * self.lanes

    def size(self, features: int) -> int:
        """Elements of a tensor."""
        return self.columns * (features + 1)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield each panel's first column and its width."""
        tiles, first = self.tiles, 0
        for panel in range(tiles.total):
            width = (tiles.nt if panel < tiles.full else tiles.nt_rest) * self.lanes
            yield first, width
            first += width

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """Lay out activations [tokens, features] of float32; what pads the last vector is zero."""
        features = rows.shape[1]
        padded = np.zeros((self.columns, features), np.float32)
        padded[: self.tokens] = rows
        flat = np.zeros(self.size(features), np.float32)
        for first, width in self.bounds():
            at = first * (features + 1)
            flat[at : at + features * width] = padded[first : first + width].T.reshape(-1)
        return flat

    def unpack(self, flat: np.ndarray, features: int) -> np.ndarray:
        """Undo `pack`."""
        rows = np.empty((self.columns, features), np.float32)
        for first, width in self.bounds():
            at = first * (features + 1)
            rows[first : first + width] = flat[at : at + features * width].reshape(-1, width).T
        return rows[: self.tokens]


@dataclass(frozen=True)
class Source:
    """Where a value lies: in which argument, how many features that has, the value's first one."""

    argument: int
    features: int
    first: int = 0
