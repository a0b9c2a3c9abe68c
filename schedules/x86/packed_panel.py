"""Where a block of activations is packed for the kernels that cannot read it where it lies."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as B

from ..vectors import Vectors


class PackedPanel:
    """A block of activations in L1, [kb][nt vectors], with a row of zeros behind it."""

    def __init__(self, vectors: Vectors, kb: int, nt: int) -> None:
        self.vectors, self.kb, self.nt = vectors, kb, nt
        width = nt * vectors.lanes
        depth = -(-kb // vectors.lanes) * vectors.lanes
        # Copies may run past the block by less than a vector.
        size = (depth + 1) * width + vectors.lanes
        self.buffer = B.alloc_buffer((size,), "float32", scope="global")

    def close(self) -> None:
        """Write the zeros, once the block is packed: packing may have run into them."""
        write_zeros(self.vectors, self.buffer, self.kb * self.nt * self.vectors.lanes, self.nt)


def write_zeros(vectors: Vectors, buffer: Any, at: Any, nt: int) -> None:
    """Write the row of zeros behind a panel, which padding in a weight names."""
    for j in range(nt):
        vectors.store(buffer, vectors.zero(), at + j * vectors.lanes)
