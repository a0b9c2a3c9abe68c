"""Recognise root-mean-square normalisation exported as square, mean, square root and division."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx

from ..model import Model
from .recognize_layer_norm import mean_axes, squared_operands
from .rewrite_main import MainRewriter, call_of, dtype_of, shape_of


def recognize_rms_norm(model: Model) -> Model:
    """Replace the decomposed form over the last axis by ``R.nn.rms_norm``.

    A factor behind it becomes the weight, which is ones until then.
    """
    return MainRewriter(model).run(_rule)


@dataclass(frozen=True)
class _Root:
    """``sqrt(mean(x^2) + eps)``."""

    data: Any
    eps: float


def _rule(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if dtype_of(var) != "float32":
        return None
    if call_of(expr, "multiply"):
        scaled = _scaled(rewriter, expr)
        if scaled is not None:
            return scaled
    root = _divided(rewriter, expr)
    features = (shape_of(var) or (None,))[-1]
    if root is None or not isinstance(features, tirx.IntImm):
        return None
    ones = rewriter.add_param(np.ones(int(features), np.float32), "rms_norm_gamma", "rms_norm")
    return relax.op.nn.rms_norm(root.data, ones, [-1], root.eps)


def _scaled(rewriter: MainRewriter, expr: Any) -> Any:
    """Put a factor of every feature in the place of a weight of ones."""
    norm, factor = rewriter.lookup(expr.args[0]), rewriter.params.get(expr.args[1])
    if factor is None or not call_of(norm, "nn.rms_norm"):
        return None
    weight = rewriter.params.get(norm.args[1])
    if weight is None or weight.shape != factor.shape or not np.all(weight == 1):
        return None
    return relax.op.nn.rms_norm(norm.args[0], expr.args[1], [-1], float(norm.attrs.epsilon))


def _divided(rewriter: MainRewriter, expr: Any) -> _Root | None:
    """Match x / root, x * (1 / root) and x * rsqrt(...)."""
    if call_of(expr, "divide"):
        return _root(rewriter, expr.args[1], expr.args[0])
    if not call_of(expr, "multiply"):
        return None
    for x, factor in (expr.args, reversed(expr.args)):
        inverse = rewriter.lookup(factor)
        if call_of(inverse, "rsqrt"):
            found = _mean_square(rewriter, inverse.args[0], x)
        elif call_of(inverse, "divide") and rewriter.scalar(inverse.args[0]) == 1.0:
            found = _root(rewriter, inverse.args[1], x)
        else:
            found = None
        if found is not None:
            return found
    return None


def _root(rewriter: MainRewriter, leaf: Any, x: Any) -> _Root | None:
    call = rewriter.lookup(leaf)
    is_root = call_of(call, "sqrt") or (
        call_of(call, "power") and rewriter.scalar(call.args[1]) == 0.5
    )
    return _mean_square(rewriter, call.args[0], x) if is_root else None


def _mean_square(rewriter: MainRewriter, leaf: Any, x: Any) -> _Root | None:
    """Match mean(x^2) + eps over the last axis of `x`."""
    added = rewriter.lookup(leaf)
    if not call_of(added, "add"):
        return None
    eps, mean = rewriter.scalar(added.args[1]), rewriter.lookup(added.args[0])
    ndim = len(shape_of(x) or ())
    if eps is None or not call_of(mean, "mean") or mean_axes(mean, mean.args[0]) != (ndim - 1,):
        return None
    squares = squared_operands(rewriter, rewriter.lookup(mean.args[0]))
    return _Root(x, eps) if any(leaf.same_as(x) for leaf in squares) else None
