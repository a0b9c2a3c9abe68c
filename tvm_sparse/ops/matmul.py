"""Matrix products of activations with a constant weight."""

from __future__ import annotations

from typing import Any

from ..workload import MatmulGeometry
from .base import Operator, Recognised, static


def _recognise(call: Any, weight_shape: tuple[int, ...]) -> Recognised:
    if len(weight_shape) != 2:
        return Recognised(
            None, f"the weight has {len(weight_shape)} dimensions; only matrices are packed"
        )
    k, m = weight_shape
    tokens: int | None = 1
    for extent in list(call.args[0].ty.shape)[:-1]:
        size = static(extent)
        tokens = None if size is None or tokens is None else tokens * size
    if tokens == 0:
        return Recognised(None, "the activations are empty")
    return Recognised(MatmulGeometry(m, k, tokens))


MATMUL = Operator("matmul", "relax.matmul", _recognise, lambda rank: rank - 1)
