"""Fix symbolic dimensions of inputs by the shapes that a user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ModelError
from ..model import TensorSpec

# Sizes are multiplied with each other, in 64 bits.
_LARGEST = 2**31 - 1


def solve_dimensions(
    inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, int]:
    """Match given shapes against the inputs' own.

    Parameters
    ----------
    inputs : sequence of TensorSpec
        With symbolic dimensions by name.
    shapes : mapping of str to sequence of int, or None

    Returns
    -------
    dict of str to int
        The value of each symbolic dimension that is fixed now.

    Raises
    ------
    ModelError
        When a name, a rank or a fixed dimension does not fit, or a symbol gets two values.
    """
    known = {spec.name: spec for spec in inputs}
    solved: dict[str, int] = {}
    for name, given in (shapes or {}).items():
        if name not in known:
            raise ModelError(
                f"the model has no input '{name}'; its inputs are {', '.join(map(repr, known))}"
            )
        _match(known[name], [int(size) for size in given], solved)
    return solved


def _match(spec: TensorSpec, given: list[int], solved: dict[str, int]) -> None:
    if len(given) != len(spec.shape):
        raise ModelError(
            f"input '{spec.name}' has {len(spec.shape)} dimensions {_text(spec.shape)}, "
            f"but the given shape {_text(given)} has {len(given)}"
        )
    for wanted, size in zip(spec.shape, given, strict=True):
        if size > _LARGEST:
            raise ModelError(f"the given shape of '{spec.name}' has a size that is too large")
        if size < 1:
            raise ModelError(f"the given shape {_text(given)} of '{spec.name}' is not positive")
        value = solved.setdefault(wanted, size) if isinstance(wanted, str) else wanted
        if value != size:
            what = f"'{wanted}' is {value} already" if isinstance(wanted, str) else f"it is {value}"
            raise ModelError(
                f"the given shape {_text(given)} does not fit input '{spec.name}' "
                f"{_text(spec.shape)}: {what}, not {size}"
            )


def _text(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
