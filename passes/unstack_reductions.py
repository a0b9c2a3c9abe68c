"""Replace ``sum(stack([a, b, ...]))`` by ``a + b + ...``; likewise min, max and mean.

TVM's importer writes the variadic ONNX operators this way, which copies every operand (ResNet-50
has sixteen of them).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, dtype_of, same_shape

_PAIRWISE = {
    "sum": relax.op.add,
    "mean": relax.op.add,
    "max": relax.op.maximum,
    "min": relax.op.minimum,
}


def unstack_reductions(model: Model) -> Model:
    """Rewrite reductions over the axis that a stack has just made."""
    return MainRewriter(model).run(_unstack)


def _unstack(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    name = next((name for name in _PAIRWISE if call_of(expr, name)), None)
    if name is None or expr.attrs.keepdims or expr.attrs.axis is None or not expr.args:
        return None
    stack = rewriter.lookup(expr.args[0])
    if not call_of(stack, "stack") or not isinstance(stack.args[0], relax.Tuple):
        return None
    ndim = expr.args[0].ty.ndim
    axes = [int(axis) % ndim for axis in expr.attrs.axis]
    if axes != [int(stack.attrs.axis or 0) % ndim]:
        return None
    items = [_unbroadcast(rewriter, item) for item in stack.args[0].fields]
    result = reduce(lambda a, b: rewriter.emit(_PAIRWISE[name](a, b)), items)
    if not same_shape(result, var):
        return None
    if name == "mean":
        scale = relax.const(1.0 / len(items), dtype_of(var))
        result = rewriter.emit(relax.op.multiply(result, scale))
    return result


def _unbroadcast(rewriter: MainRewriter, item: Any) -> Any:
    producer = rewriter.lookup(item)
    return producer.args[0] if call_of(producer, "broadcast_to") else item
