"""Sparse weight formats: how a pruned matrix is laid out for a kernel.

A format is a row in `FORMATS`; the contract tests in tests/unit/test_formats.py run over the table.
"""

from __future__ import annotations

from .base import Match, PackedWeight, SparseFormat
from .bitmap_tiles import BitmapTiles
from .compact_channels import CompactChannels
from .dense_panels import DensePanels
from .gathered_panels import GatheredPanels
from .n_of_m import NOfM
from .plain import Plain
from .register_tiled import RegisterTiled
from .row_tiles import RowTiles
from .sliced_ell import SlicedEll
from .tensor_tiles import TensorTiles

FORMATS: dict[str, SparseFormat] = {
    "dense": DensePanels(),
    "plain": Plain(),
    "register_tiled": RegisterTiled(),
    "sliced_ell": SlicedEll(),
    "gathered_panels": GatheredPanels(),
    "compact_channels": CompactChannels(),
    "n_of_m": NOfM(),
    "row_tiles": RowTiles(),
    "tile_wise": TensorTiles("tile_wise", dense=True, sparse=False),
    "two_four": TensorTiles("two_four", dense=False, sparse=True),
    "tile_wise_two_four": TensorTiles("tile_wise_two_four", dense=True, sparse=True),
    "bitmap_tiles": BitmapTiles(),
}

__all__ = ["FORMATS", "Match", "PackedWeight", "SparseFormat"]
