"""Recognise GELU that was exported as its formula, with erf or tanh."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, dtype_of, same_shape

# Exporters write sqrt(2) and sqrt(2 / pi) with six digits or more.
_TOLERANCE = 1e-5
_CUBIC = 0.044715


def recognize_gelu(model: Model) -> Model:
    """Replace x * (1 + erf(x / sqrt(2))) / 2, and its approximation by tanh, by one operator."""
    return MainRewriter(model).run(_rule)


def _rule(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if not call_of(expr, "multiply") or dtype_of(var) != "float32":
        return None
    factor, leaves = _factors(rewriter, expr)
    if len(leaves) != 2 or not _near(factor, 0.5):
        return None
    for x, shifted in (leaves, reversed(leaves)):
        if not same_shape(x, var):
            continue
        inner = _plus_one(rewriter, shifted)
        if call_of(inner, "erf") and _is_scaled(rewriter, inner.args[0], x, math.sqrt(0.5)):
            return relax.op.nn.gelu(x)
        if call_of(inner, "tanh") and _is_cubic(rewriter, inner.args[0], x):
            return relax.op.nn.gelu_tanh(x)
    return None


def _near(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=_TOLERANCE)


def _factors(rewriter: MainRewriter, expr: Any) -> tuple[float, list[Any]]:
    """Take a product apart: the numbers in it multiplied, and what else it is made of."""
    factor = 1.0
    leaves: list[Any] = []
    for leaf in expr.args:
        number = rewriter.scalar(leaf)
        inner = rewriter.lookup(leaf)
        if number is not None:
            factor *= number
        elif call_of(inner, "multiply"):
            within, more = _factors(rewriter, inner)
            factor, leaves = factor * within, leaves + more
        elif call_of(inner, "divide") and rewriter.scalar(inner.args[1]):
            factor /= rewriter.scalar(inner.args[1]) or 1.0
            leaves.append(inner.args[0])
        else:
            leaves.append(leaf)
    return factor, leaves


def _plus_one(rewriter: MainRewriter, leaf: Any) -> Any:
    """Return the call in 1 + call."""
    call = rewriter.lookup(leaf)
    if not call_of(call, "add"):
        return None
    for one, other in (call.args, reversed(call.args)):
        if rewriter.scalar(one) == 1.0:
            return rewriter.lookup(other)
    return None


def _is_scaled(rewriter: MainRewriter, leaf: Any, x: Any, wanted: float) -> bool:
    """Whether a value is `wanted` times x."""
    call = rewriter.lookup(leaf)
    if call_of(call, "divide"):
        number = rewriter.scalar(call.args[1])
        return bool(number) and call.args[0].same_as(x) and _near(1 / (number or 1.0), wanted)
    if not call_of(call, "multiply"):
        return False
    factor, leaves = _factors(rewriter, call)
    return len(leaves) == 1 and leaves[0].same_as(x) and _near(factor, wanted)


def _is_cubic(rewriter: MainRewriter, leaf: Any, x: Any) -> bool:
    """Whether a value is sqrt(2 / pi) * (x + 0.044715 x^3)."""
    call = rewriter.lookup(leaf)
    if not call_of(call, "multiply"):
        return False
    factor, leaves = _factors(rewriter, call)
    if len(leaves) != 1 or not _near(factor, math.sqrt(2 / math.pi)):
        return False
    total = rewriter.lookup(leaves[0])
    if not call_of(total, "add"):
        return False
    for plain, cubed in (total.args, reversed(total.args)):
        inner = rewriter.lookup(cubed)
        if plain.same_as(x) and call_of(inner, "multiply"):
            number, parts = _factors(rewriter, inner)
            if _near(number, _CUBIC) and _is_third_power(rewriter, parts, x):
                return True
    return False


def _is_third_power(rewriter: MainRewriter, parts: list[Any], x: Any) -> bool:
    if len(parts) == 1:
        power = rewriter.lookup(parts[0])
        return (
            call_of(power, "power")
            and power.args[0].same_as(x)
            and rewriter.scalar(power.args[1]) == 3.0
        )
    return len(parts) == 3 and all(part.same_as(x) for part in parts)
