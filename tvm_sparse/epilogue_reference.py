"""What an epilogue computes, in float64, with a bound on what float32 may differ by.

The bound is carried along operation by operation (running error analysis: N. J. Higham, *Accuracy
and Stability of Numerical Algorithms*, section 3.3), so that it holds for whatever graph was fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import erf as erf64

from .check import UNIT_ROUNDOFF
from .workload import Epilogue, EpilogueRef

# What the vector approximations may be wrong by: absolute, and relative to the result.
_ABSOLUTE = 6e-7
_RELATIVE = 8 * UNIT_ROUNDOFF

Bounded = tuple[np.ndarray, np.ndarray]


def _add(a: Bounded, b: Bounded) -> Bounded:
    return a[0] + b[0], a[1] + b[1]


def _subtract(a: Bounded, b: Bounded) -> Bounded:
    return a[0] - b[0], a[1] + b[1]


def _multiply(a: Bounded, b: Bounded) -> Bounded:
    return a[0] * b[0], np.abs(a[0]) * b[1] + np.abs(b[0]) * a[1] + a[1] * b[1]


def _divide(a: Bounded, b: Bounded) -> Bounded:
    value = a[0] / b[0]
    least = np.abs(b[0]) - b[1]
    with np.errstate(divide="ignore"):
        bound = (a[1] + np.abs(value) * b[1]) / np.where(least > 0, least, 0.0)
    return value, bound


def _maximum(a: Bounded, b: Bounded) -> Bounded:
    return np.maximum(a[0], b[0]), np.maximum(a[1], b[1])


def _minimum(a: Bounded, b: Bounded) -> Bounded:
    return np.minimum(a[0], b[0]), np.maximum(a[1], b[1])


def _slope(function: Callable[[np.ndarray], np.ndarray], steepest: float) -> Callable[..., Bounded]:
    """Wrap an approximated function whose derivative is at most `steepest` anywhere."""

    def bounded(a: Bounded) -> Bounded:
        value = function(a[0])
        return value, steepest * a[1] + _ABSOLUTE + _RELATIVE * np.abs(value)

    return bounded


def _exp(a: Bounded) -> Bounded:
    value = np.exp(a[0])
    return value, value * np.expm1(a[1]) + _RELATIVE * value


def _sqrt(a: Bounded) -> Bounded:
    value = np.sqrt(a[0])
    return value, np.sqrt(np.maximum(a[0], 0) + a[1]) - np.sqrt(np.maximum(a[0] - a[1], 0))


def _sigmoid64(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _gelu64(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf64(x * np.sqrt(0.5)))


def _gelu_tanh64(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _scaled(
    function: Callable[[np.ndarray], np.ndarray], steepest: float
) -> Callable[..., Bounded]:
    """Wrap an approximated function of the form x * g(x): its error grows with x."""

    def bounded(a: Bounded) -> Bounded:
        value = function(a[0])
        noise = (_ABSOLUTE + _RELATIVE) * (1 + np.abs(a[0]))
        return value, steepest * a[1] + noise

    return bounded


# The operations of `schedules.epilogue.EMITTERS`.
REFERENCES: dict[str, Callable[..., Bounded]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "divide": _divide,
    "maximum": _maximum,
    "minimum": _minimum,
    "negative": lambda a: (-a[0], a[1]),
    "abs": lambda a: (np.abs(a[0]), a[1]),
    "sqrt": _sqrt,
    "exp": _exp,
    "erf": _slope(erf64, 2 / np.sqrt(np.pi)),
    "tanh": _slope(np.tanh, 1.0),
    "sigmoid": _slope(_sigmoid64, 0.25),
    "silu": _scaled(lambda x: x * _sigmoid64(x), 1.1),
    "gelu": _scaled(_gelu64, 1.13),
    "gelu_tanh": _scaled(_gelu_tanh64, 1.13),
}

# Results that float32 arithmetic does not round.
_EXACT = frozenset({"maximum", "minimum", "negative", "abs"})


def evaluate64(
    epilogue: Epilogue,
    acc: np.ndarray,
    bound: np.ndarray,
    channels: Sequence[np.ndarray],
    tensors: Sequence[np.ndarray],
) -> Bounded:
    """Evaluate an epilogue.

    Parameters
    ----------
    epilogue : Epilogue
    acc, bound : numpy.ndarray of float64
        The operator's exact result, and what the kernel's may differ by.
    channels : sequence of numpy.ndarray
        Per-channel vectors, shaped to broadcast against `acc`.
    tensors : sequence of numpy.ndarray
        Of the shape of `acc`.

    Returns
    -------
    value, bound : numpy.ndarray of float64
        The result, and what float32 may differ by.
    """
    nodes: list[Bounded] = []
    exact = np.zeros(())

    def operand(ref: EpilogueRef) -> Bounded:
        if ref.kind == "acc":
            return acc, bound
        if ref.kind == "node":
            return nodes[ref.index]
        if ref.kind == "scalar":
            return np.asarray(np.float32(ref.value), np.float64), exact
        values = channels[ref.index] if ref.kind == "channel" else tensors[ref.index]
        return values.astype(np.float64), exact

    with np.errstate(invalid="ignore", over="ignore"):
        for op in epilogue.ops:
            value, error = REFERENCES[op.name](*(operand(ref) for ref in op.inputs))
            rounding = 0.0 if op.name in _EXACT else UNIT_ROUNDOFF * (np.abs(value) + error)
            nodes.append((value, error + rounding))
    return nodes[-1] if nodes else (acc, bound)
