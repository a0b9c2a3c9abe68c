"""The patterns that weights are pruned to, by the names that a call gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import SparseError
from .sites import PrunableLayer

Kind = Literal["unstructured", "n:m", "v:n:m", "block", "kernel", "channel", "tile-wise"]

PATTERNS = (
    "unstructured",
    "N:M",
    "V:N:M",
    "block:RxC",
    "vector:V",
    "vector:1xV",
    "kernel",
    "channel",
    "filter",
    "neuron",
    "tile-wise:G",
    "tile-wise:G+R%",
)

# Columns of a V x M block that V:N:M keeps: what 2:4 hardware takes at a time.
VNM_COLUMNS = 4


@dataclass(frozen=True)
class Pattern:
    """A pattern as it is named in a call, read.

    Attributes
    ----------
    kind : str
        What a unit is.
    size : tuple of int
        (N, M), (V, N, M), the rows and columns of a block or the features of a tile; empty
        otherwise.
    restored : float
        Share of the cut elements that a tile-wise pattern gives back.
    layers : {"all", "convolutions", "products"}
        Which layers it is for.
    """

    kind: Kind
    size: tuple[int, ...] = ()
    restored: float = 0.0
    layers: Literal["all", "convolutions", "products"] = "all"

    @property
    def implied(self) -> float | None:
        """The sparsity that the pattern fixes; None when the call chooses it."""
        if self.kind in ("n:m", "v:n:m"):
            return 1.0 - self.size[-2] / self.size[-1]
        return None

    def refuse(self, layer: PrunableLayer) -> str:
        """Say why a layer cannot be pruned this way; empty when it can."""
        is_conv = layer.op == "Conv"
        if self.kind == "kernel" and not is_conv:
            return "it has no kernels; 'kernel' is for convolutions"
        if self.layers == "convolutions" and not is_conv:
            return "it is no convolution; 'filter' prunes those only"
        if self.layers == "products" and is_conv:
            return "it is a convolution; 'neuron' prunes matmuls only"
        if self.kind == "tile-wise" and layer.groups > 1:
            return "a tile would mix groups of this convolution, which see different inputs"
        return ""


_PLAIN = {
    "unstructured": Pattern("unstructured"),
    "kernel": Pattern("kernel"),
    "channel": Pattern("channel"),
    "filter": Pattern("channel", layers="convolutions"),
    "neuron": Pattern("channel", layers="products"),
}


def parse_pattern(text: str) -> Pattern:
    """Read the name of a pattern.

    Raises
    ------
    SparseError
        When it is none that this package prunes to.
    """
    if text in _PLAIN:
        return _PLAIN[text]
    if found := re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)", text):
        return _n_of_m(text, *found.groups())
    if found := re.fullmatch(r"(?:block|vector):(\d+)x(\d+)", text):
        return _block(text, int(found[1]), int(found[2]))
    if found := re.fullmatch(r"vector:(\d+)", text):
        return _block(text, int(found[1]), 1)
    if found := re.fullmatch(r"tile-wise:(\d+)(?:\+(\d+(?:\.\d+)?)%)?", text):
        return _tile_wise(text, int(found[1]), float(found[2] or 0) / 100)
    raise SparseError(f"unknown pattern '{text}'; there are {', '.join(PATTERNS)}")


def _n_of_m(text: str, vector: str | None, kept: str, group: str) -> Pattern:
    n, m = int(kept), int(group)
    if not 0 < n < m:
        raise SparseError(
            f"pattern '{text}' makes no sense: N:M keeps N of every M, with N below M"
        )
    if vector is None:
        return Pattern("n:m", (n, m))
    if int(vector) < 1 or not n < VNM_COLUMNS <= m:
        raise SparseError(
            f"pattern '{text}' makes no sense: V:N:M keeps {VNM_COLUMNS} columns of every block of "
            f"V x M and N of them in each row, so V is at least 1, N below {VNM_COLUMNS} and M at "
            f"least {VNM_COLUMNS}"
        )
    return Pattern("v:n:m", (int(vector), n, m))


def _block(text: str, rows: int, columns: int) -> Pattern:
    if min(rows, columns) < 1:
        raise SparseError(f"pattern '{text}' makes no sense: a block has at least one element")
    if text.startswith("vector:") and min(rows, columns) > 1:
        raise SparseError(f"pattern '{text}' makes no sense: a vector is one row or one column")
    return Pattern("block", (rows, columns))


def _tile_wise(text: str, tile: int, restored: float) -> Pattern:
    if tile < 1:
        raise SparseError(f"pattern '{text}' makes no sense: a tile has at least one feature")
    if not restored < 1:
        raise SparseError(
            f"pattern '{text}' makes no sense: below 100% of what is cut can be given back"
        )
    return Pattern("tile-wise", (tile,), restored)
