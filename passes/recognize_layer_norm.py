"""Recognise layer normalisation that was exported as mean, subtract, square, mean, sqrt, divide."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..model import Model
from .rewrite_main import (
    MainRewriter,
    bindings_of,
    call_of,
    dtype_of,
    operands_of,
    same_shape,
    shape_of,
)


def recognize_layer_norm(model: Model) -> Model:
    """Replace the decomposed form by ``R.nn.layer_norm`` with `gamma` and `beta` parameters.

    The mean and the variance must be over the same trailing axes; a multiply and an add with
    constants of that shape become gamma and beta, else these are ones and zeros.
    """
    rewriter = MainRewriter(model)
    return rewriter.run(_Recognizer(rewriter))


@dataclass(frozen=True)
class _Core:
    """``(x - mean(x)) / sqrt(var(x) + eps)``."""

    data: Any
    axes: tuple[int, ...]
    eps: float


class _Recognizer:
    def __init__(self, rewriter: MainRewriter) -> None:
        self.users: dict[Any, list[Any]] = defaultdict(list)
        for binding in bindings_of(rewriter.func):
            for leaf in operands_of(binding.value):
                if isinstance(leaf, relax.Var):
                    self.users[leaf].append(binding)
        # Old variable at which the whole norm is known -> its core and its gamma.
        self.scaled: dict[Any, tuple[_Core, Any]] = {}
        self.cores: dict[Any, _Core] = {}

    def __call__(self, rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        core = _match_core(rewriter, expr)
        if core is not None:
            if self._next(rewriter, var, "multiply", core) is None:
                return _layer_norm(rewriter, core, None, None)
            pending = rewriter.emit(expr, var.name)
            self.cores[pending] = core
            return pending
        if call_of(expr, "multiply") and expr.args[0] in self.cores:
            core, gamma = self.cores[expr.args[0]], expr.args[1]
            if self._next(rewriter, var, "add", core) is None:
                return _layer_norm(rewriter, core, gamma, None)
            pending = rewriter.emit(expr, var.name)
            self.scaled[pending] = (core, gamma)
            return pending
        if call_of(expr, "add") and expr.args[0] in self.scaled:
            core, gamma = self.scaled[expr.args[0]]
            return _layer_norm(rewriter, core, gamma, expr.args[1])
        return None

    def _next(self, rewriter: MainRewriter, var: Any, op_name: str, core: _Core) -> Any:
        """Return the only user of `var` when it goes on with `op_name` and a fitting constant."""
        if rewriter.uses[var] != 1 or len(self.users[var]) != 1:
            return None
        call = self.users[var][0].value
        if not call_of(call, op_name) or not call.args[0].same_as(var):
            return None
        value = rewriter.params.get(call.args[1])
        return call if value is not None and value.shape == _tail(core) else None


def _tail(core: _Core) -> tuple[Any, ...]:
    dims = shape_of(core.data) or ()
    return tuple(int(dims[axis]) for axis in core.axes)


def _layer_norm(rewriter: MainRewriter, core: _Core, gamma: Any, beta: Any) -> Any:
    dtype = dtype_of(core.data)
    if gamma is None:
        gamma = rewriter.add_param(np.ones(_tail(core), dtype), "layer_norm_gamma", "layer_norm")
    if beta is None:
        beta = rewriter.add_param(np.zeros(_tail(core), dtype), "layer_norm_beta", "layer_norm")
    return relax.op.nn.layer_norm(core.data, gamma, beta, list(core.axes), core.eps)


def _match_core(rewriter: MainRewriter, expr: Any) -> _Core | None:
    deviation, spread = _numerator_and_variance(rewriter, expr)
    centred, added = rewriter.lookup(deviation), rewriter.lookup(spread)
    if not call_of(centred, "subtract") or not call_of(added, "add"):
        return None
    eps = rewriter.scalar(added.args[1])
    data, mean = centred.args[0], rewriter.lookup(centred.args[1])
    axes = mean_axes(mean, data)
    if (
        eps is None
        or axes is None
        or not _is_variance(rewriter, added.args[0], deviation, data, axes)
    ):
        return None
    dims = shape_of(data) or ()
    if not all(isinstance(dims[axis], tvm.tirx.IntImm) for axis in axes):
        return None
    return _Core(data, axes, eps)


def _numerator_and_variance(rewriter: MainRewriter, expr: Any) -> tuple[Any, Any]:
    if call_of(expr, "divide"):
        root = rewriter.lookup(expr.args[1])
        if call_of(root, "sqrt"):
            return expr.args[0], root.args[0]
        if call_of(root, "power") and rewriter.scalar(root.args[1]) == 0.5:
            return expr.args[0], root.args[0]
    if call_of(expr, "multiply"):
        root = rewriter.lookup(expr.args[1])
        if call_of(root, "rsqrt"):
            return expr.args[0], root.args[0]
    return None, None


def mean_axes(mean: Any, data: Any) -> tuple[int, ...] | None:
    """Return the axes of ``mean(data)`` with kept dimensions, when they are the trailing ones."""
    if not call_of(mean, "mean") or not mean.attrs.keepdims or not mean.args[0].same_as(data):
        return None
    ndim = len(shape_of(data) or ())
    if mean.attrs.axis is None or not ndim:
        return None
    axes = tuple(sorted(int(axis) % ndim for axis in mean.attrs.axis))
    return axes if axes == tuple(range(ndim - len(axes), ndim)) else None


def _is_variance(
    rewriter: MainRewriter, leaf: Any, deviation: Any, data: Any, axes: tuple[int, ...]
) -> bool:
    call = rewriter.lookup(leaf)
    if call_of(call, "variance"):
        return call.args[0].same_as(data) and bool(call.attrs.keepdims)
    if not call_of(call, "mean"):
        return False
    squared = rewriter.lookup(call.args[0])
    if mean_axes(call, call.args[0]) != axes:
        return False
    return any(
        leaf.same_as(deviation) or _same_deviation(rewriter, leaf, deviation)
        for leaf in squared_operands(rewriter, squared)
    )


def squared_operands(rewriter: MainRewriter, call: Any) -> list[Any]:
    """Return what a call squares, in a list; an empty one when it is no square."""
    if call_of(call, "power") and rewriter.scalar(call.args[1]) == 2.0:
        return [call.args[0]]
    if call_of(call, "multiply") and call.args[0].same_as(call.args[1]):
        return [call.args[0]]
    return [call.args[0]] if call_of(call, "square") else []


def _same_deviation(rewriter: MainRewriter, left: Any, right: Any) -> bool:
    """Say whether two subtractions are of the same data and mean; some exporters write it twice."""
    a, b = rewriter.lookup(left), rewriter.lookup(right)
    if not call_of(a, "subtract") or not call_of(b, "subtract"):
        return False
    if not a.args[0].same_as(b.args[0]) or not same_shape(left, right):
        return False
    means = [rewriter.lookup(a.args[1]), rewriter.lookup(b.args[1])]
    return all(call_of(m, "mean") and m.args[0].same_as(a.args[0]) for m in means)
