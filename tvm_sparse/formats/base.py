"""What every weight format offers: can it hold this weight, pack it, unpack it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .order import PackedOrder


@dataclass(frozen=True)
class Match:
    """Whether something applies; when not, the reason in words."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix in the layout of one format.

    Attributes
    ----------
    format : str
        Key in `formats.FORMATS`.
    shape : tuple of int
        Rows and columns of the matrix that was packed.
    config : mapping
        The format's parameters, for example panel height and block length.
    arrays : mapping of str to numpy.ndarray
        What the kernel reads, in the order of its arguments.
    """

    format: str
    shape: tuple[int, int]
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight takes in the library."""
        return sum(int(array.nbytes) for array in self.arrays.values())


class SparseFormat(Protocol):
    """A way to lay out a weight matrix; instances are frozen and hold no weight."""

    @property
    def name(self) -> str:
        """Key in `formats.FORMATS`."""
        ...

    def supports(self, weight: np.ndarray, config: Mapping[str, Any]) -> Match:
        """Tell whether `weight` [rows, columns] can be packed with `config`."""
        ...

    def pack(self, weight: np.ndarray, config: Mapping[str, Any]) -> PackedWeight:
        """Lay out a matrix [rows, columns]; -0.0 counts as zero, NaN and Inf are kept."""
        ...

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        """Restore the matrix bit for bit (a -0.0 that was packed comes back as 0.0)."""
        ...

    def order(self, packed: PackedWeight) -> PackedOrder | None:
        """Tell where rows and columns went, for pictures; None: they are where they were."""
        ...


def check_matrix(weight: np.ndarray, dtypes: Collection[str] = frozenset({"float32"})) -> Match:
    """Refuse what is no matrix, has no elements, or is of none of the types that a format holds."""
    if weight.ndim != 2:
        return Match(False, f"the weight has {weight.ndim} dimensions, a matrix has 2")
    if str(weight.dtype) not in dtypes:
        known = " and ".join(sorted(dtypes))
        return Match(False, f"the weight is {weight.dtype}; the format holds {known}")
    if 0 in weight.shape:
        return Match(False, "the weight has no elements")
    return Match(True)
