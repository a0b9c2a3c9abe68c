"""Products of a warp's fragments on tensor cores, in any of the types that kernels have.

Tensor cores multiply float32 as TF32, whose numbers have 11 digits. A float32 is split into two of
them, and three of the four products of two such pairs are added up; what is left out is as small as
float32's own rounding of a few terms (H. Ootomo and R. Yokota, "Recovering single precision
accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", IJHPCA 2022).
"""

from __future__ import annotations

from typing import Any

from .ptx import multiply, multiply_two_of_four, split
from .threads import local, whole


class Multiplier:
    """Multiplies fragments in registers.

    Parameters
    ----------
    dtype : str
        Of the elements.
    part : str
        "dense" or "sparse".
    a, b : Buffer
        4 registers of each fragment of rows, and 2 of a fragment of columns, 4 of two of four.
    chosen : Buffer or None
        What two of four keep of each fragment of rows.
    """

    def __init__(self, dtype: str, part: str, a: Any, b: Any, chosen: Any) -> None:
        self.dtype, self.part, self.a, self.b, self.chosen = dtype, part, a, b, chosen
        self.width = 2 if part == "dense" else 4
        if dtype == "float32":
            length = int(a.shape[0])
            self.a_parts = [whole(local(length, "uint32")) for _ in range(2)]
            self.b_parts = [whole(local(self.width, "uint32")) for _ in range(2)]

    def multiply(self, sums: Any, rows: int, columns: int) -> None:
        """Add the products of all pairs of fragments."""
        if self.dtype == "float32":
            self._in_three_products(sums, rows, columns)
            return
        for i in range(rows):
            for j in range(columns):
                self._one(sums[(i * columns + j) * 4], (self.a, i * 4), (self.b, j * self.width), i)

    def _in_three_products(self, sums: Any, rows: int, columns: int) -> None:
        (a_big, a_small), (b_big, b_small) = self.a_parts, self.b_parts
        for i in range(rows):
            split(a_big[i * 4], a_small[i * 4], self.a[i * 4], 4)
        for j in range(columns):
            split(b_big[0], b_small[0], self.b[j * self.width], self.width)
            for i in range(rows):
                into = sums[(i * columns + j) * 4]
                # The smallest first.
                for a, b in ((a_small, b_big), (a_big, b_small), (a_big, b_big)):
                    self._one(into, (a, i * 4), (b, 0), i)

    def _one(self, into: Any, a: tuple[Any, int], b: tuple[Any, int], i: int) -> None:
        first, second = a[0][a[1]], b[0][b[1]]
        if self.part == "dense":
            multiply(into, first, second, self.dtype)
        else:
            multiply_two_of_four(into, first, second, self.chosen[i], 0, self.dtype)
