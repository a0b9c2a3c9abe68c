"""The floating-point types of weights and activations, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FloatType:
    """What rounding to a type does to a number.

    Attributes
    ----------
    roundoff : float
        Half the spacing at 1: the largest relative error of one rounding.
    smallest, smallest_normal : float
        The smallest positive number, and the smallest that has all its digits.
    largest : float
        The largest finite number.
    """

    roundoff: float
    smallest: float
    smallest_normal: float
    largest: float


FLOAT_TYPES = {
    "float32": FloatType(2.0**-24, 2.0**-149, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "float16": FloatType(2.0**-11, 2.0**-24, 2.0**-14, 65504.0),
    "bfloat16": FloatType(2.0**-8, 2.0**-133, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
}

# Their kernels multiply and add in float32, and round the result to the type.
HALF_TYPES = frozenset({"float16", "bfloat16"})


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's type of a name; bfloat16 is known to it by the package ml_dtypes only."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def is_float(dtype: Any) -> bool:
    """Say whether a NumPy or TVM element type is floating point, bfloat16 included."""
    return str(dtype).startswith(("float", "bfloat"))
