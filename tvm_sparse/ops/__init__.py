"""Operators that carry weights: how each is recognised in a Relax module.

An operator is a row in `OPERATORS`.
"""

from __future__ import annotations

from .base import Operator, Recognised, WeightSite
from .conv2d import CONV2D
from .matmul import MATMUL

OPERATORS: dict[str, Operator] = {
    "relax.matmul": MATMUL,
    "relax.nn.conv2d": CONV2D,
}

__all__ = ["OPERATORS", "Operator", "Recognised", "WeightSite"]
