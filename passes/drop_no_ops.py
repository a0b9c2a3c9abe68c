"""Drop operators on activations that change nothing, and put constants on the right-hand side."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, dtype_of, same_shape, shape_of

_SAME_SHAPE = ("broadcast_to", "reshape", "expand_dims", "squeeze", "flatten", "tile", "repeat")
_COMMUTATIVE = ("add", "multiply", "maximum", "minimum")
_BINARY = (*_COMMUTATIVE, "subtract", "divide", "power")
# Operator -> the scalar operand on the right with which it does nothing.
_NEUTRAL = {"add": 0.0, "subtract": 0.0, "multiply": 1.0, "divide": 1.0, "power": 1.0}


def drop_no_ops(model: Model) -> Model:
    """Remove reshapes, broadcasts, casts and transposes that are identities; merge chains."""
    return MainRewriter(model).run(_simplify)


def _simplify(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op) or not expr.args:
        return None
    name = expr.op.name.removeprefix("relax.")
    if name in ("expand_dims", "squeeze"):
        expr = _as_reshape(rewriter, var, expr)
        name = expr.op.name.removeprefix("relax.")
    if name in ("reshape", "permute_dims"):
        return _merge(rewriter, var, expr)
    if name in _COMMUTATIVE:
        expr = _constant_right(rewriter, expr)
    if name in _BINARY:
        expr = _scalar_right(rewriter, var, expr)
    source = expr.args[0]
    if name in _SAME_SHAPE and same_shape(source, var):
        return source
    if name == "astype" and dtype_of(source) == dtype_of(var):
        return source
    if name == "concat" and isinstance(source, relax.Tuple) and len(source.fields) == 1:
        return source.fields[0]
    if name in _NEUTRAL and _is_scalar(expr.args[1], _NEUTRAL[name]) and same_shape(source, var):
        return source
    return expr


def _constant_right(rewriter: MainRewriter, expr: Any) -> Any:
    left, right = expr.args
    if _is_constant(rewriter, left) and not _is_constant(rewriter, right):
        return relax.Call(expr.op, [right, left], expr.attrs, expr.ty_args)
    return expr


def _scalar_right(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    """Make a constant of one element a scalar, which is what later phases look for."""
    left, right = expr.args
    value = rewriter.params.get(right) if isinstance(right, relax.Var) else None
    if value is None or value.size != 1 or not same_shape(left, var):
        return expr
    scalar = relax.const(value.reshape(()), str(value.dtype))
    return relax.Call(expr.op, [left, scalar], expr.attrs, expr.ty_args)


def _is_constant(rewriter: MainRewriter, leaf: Any) -> bool:
    return isinstance(leaf, tvm.ir.GenericConst) or leaf in rewriter.params


def _is_scalar(leaf: Any, value: float) -> bool:
    return (
        isinstance(leaf, tvm.ir.GenericConst)
        and isinstance(leaf.ty, relax.TensorType)
        and leaf.ty.ndim == 0
        and bool(leaf.value.numpy() == value)
    )


def _as_reshape(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    """Write a change of rank next to a reshape as a reshape, so that the two merge."""
    dims = shape_of(var)
    before = rewriter.lookup(expr.args[0])
    near = (
        call_of(before, "reshape") or call_of(before, "expand_dims") or call_of(before, "squeeze")
    )
    return relax.op.reshape(expr.args[0], list(dims)) if near and dims is not None else expr


def _merge(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    source = expr.args[0]
    before = rewriter.lookup(source)
    if call_of(expr, "reshape"):
        if any(call_of(before, name) for name in ("reshape", "expand_dims", "squeeze")):
            source = before.args[0]
            expr = relax.Call(expr.op, [source, expr.args[1]], expr.attrs, expr.ty_args)
        return source if same_shape(source, var) else expr
    axes = _axes(expr, var)
    if axes is None:
        return expr
    if call_of(before, "permute_dims"):
        inner = _axes(before, source)
        if inner is not None:
            axes, source = [inner[axis] for axis in axes], before.args[0]
    if axes == list(range(len(axes))):
        return source
    return relax.op.permute_dims(source, axes)


def _axes(call: Any, result: Any) -> list[int] | None:
    dims = shape_of(result)
    if dims is None:
        return None
    if call.attrs.axes is None:
        return list(range(len(dims)))[::-1]
    return [int(axis) % len(dims) for axis in call.attrs.axes]
