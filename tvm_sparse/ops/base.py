"""What a weight-carrying operator must tell: whether a Relax call is one, and its geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..workload import Geometry, Workload


@dataclass(frozen=True)
class WeightSite:
    """One use of a weight in a model.

    Attributes
    ----------
    name : str
        The user's layer name, unique among the sites.
    param : str
        The weight's parameter in `Model.mod`.
    binding : str
        The variable in `main` that holds the operator's own result.
    workload : Workload
        Geometry and epilogue; `threads` is filled in by the planner.
    weight_shape : tuple of int
        Shape of the parameter.
    refusal : str
        Why no kernel of ours can take it; empty when one can.
    """

    name: str
    param: str
    binding: str
    workload: Workload
    weight_shape: tuple[int, ...]
    refusal: str = ""


@dataclass(frozen=True)
class Recognised:
    """An operator found in a Relax call: its geometry, or the reason why it stays as it is."""

    geometry: Geometry | None
    refusal: str = ""


@dataclass(frozen=True)
class Operator:
    """A row of `OPERATORS`.

    Attributes
    ----------
    relax_name : str
        The Relax operator, for example ``relax.matmul``.
    recognise : callable
        (call, weight shape) -> Recognised, for a call whose second argument is the weight.
    channel_axis : callable
        (result rank) -> axis of the output features.
    """

    name: str
    relax_name: str
    recognise: Callable[[Any, tuple[int, ...]], Recognised]
    channel_axis: Callable[[int], int]


def static(extent: Any) -> int | None:
    """Return a dimension as an integer, or None when it is symbolic."""
    value = getattr(extent, "value", extent)
    return int(value) if isinstance(value, int) else None


def product(extents: Sequence[Any]) -> Any:
    """Multiply dimensions, symbolic ones too."""
    result: Any = 1
    for extent in extents:
        result = result * extent
    return result
