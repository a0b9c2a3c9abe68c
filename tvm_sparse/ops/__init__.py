"""Operators that carry weights: how each is recognised in a Relax module.

An operator is a row in `OPERATORS`.
"""

from __future__ import annotations

from .base import Operator, Recognised, WeightSite
from .conv2d import CONV2D
from .matmul import MATMUL
from .others import OTHERS

OPERATORS: dict[str, Operator] = {
    operator.relax_name: operator for operator in (MATMUL, CONV2D, *OTHERS)
}

__all__ = ["OPERATORS", "Operator", "Recognised", "WeightSite"]
