"""Operators that carry weights and have no kernel of ours: listed, so that reports miss nothing."""

from __future__ import annotations

from typing import Any

from .base import Operator, Recognised


def _without_kernel(name: str, what: str) -> Operator:
    def recognise(_call: Any, _weight_shape: tuple[int, ...]) -> Recognised:
        return Recognised(None, f"{what} have no kernel of ours; TVM's own is used")

    return Operator(name, f"relax.nn.{name}", recognise, lambda rank: 1)


_TRANSPOSED = "transposed convolutions"

OTHERS: tuple[Operator, ...] = (
    _without_kernel("conv1d", "one-dimensional convolutions"),
    _without_kernel("conv3d", "three-dimensional convolutions"),
    _without_kernel("conv1d_transpose", _TRANSPOSED),
    _without_kernel("conv2d_transpose", _TRANSPOSED),
    _without_kernel("conv3d_transpose", _TRANSPOSED),
)
