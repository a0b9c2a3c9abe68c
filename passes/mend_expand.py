"""Mend what TVM's importer makes of ONNX's Expand and ConstantOfShape when the shape is data."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, bindings_of, call_of, main_of, shape_of


def mend_expand(model: Model) -> Model:
    """Name the sizes that come in as data, and keep the tensor's where the shape has a 1.

    Without this there would be no code, or the result would lack the rows that the shape does not
    ask for.
    """
    expanded = _expanded(main_of(model.mod))

    def rule(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        if call_of(expr, "broadcast_to") and not isinstance(expr.args[1], relax.ShapeExpr):
            return _with_names(rewriter, var, expr)
        dims = expanded.get(var)
        if dims is None:
            return None
        asked = expr.args[0]
        sizes = rewriter.emit(relax.op.shape_to_tensor(relax.ShapeExpr(dims)))
        stretches = rewriter.emit(relax.op.equal(sizes, relax.const(1, "int64")))
        mended = rewriter.emit(relax.op.where(stretches, asked, sizes))
        return relax.op.tensor_to_shape(mended)

    return MainRewriter(model).run(rule)


def _with_names(rewriter: MainRewriter, var: Any, expand: Any) -> Any:
    """Give the sizes of the result names, without which there is no code for it."""
    tensor, shape = expand.args
    if shape.ty.ndim < 0:
        return None
    sizes = [tvm.tirx.Var(f"{var.name}_{axis}", "int64") for axis in range(shape.ty.ndim)]
    rewriter.match_cast(shape, relax.ShapeType(sizes))
    return relax.op.broadcast_to(tensor, relax.ShapeExpr(sizes))


def _expanded(func: relax.Function) -> dict[Any, list[Any]]:
    """Find the shapes that tensors are expanded to, with the sizes of these tensors."""
    read: dict[Any, Any] = {}
    named: list[tuple[list[Any], Any]] = []
    expanded: dict[Any, list[Any]] = {}
    for binding in bindings_of(func):
        value = binding.value
        if call_of(value, "tensor_to_shape"):
            read[binding.var] = value
        elif isinstance(binding, relax.MatchCast) and value in read:
            named.append((list(binding.ty.values), value))
        elif call_of(value, "broadcast_to") and isinstance(value.args[1], relax.ShapeExpr):
            target, dims = list(value.args[1].values), shape_of(value.args[0])
            for sizes, var in named:
                if dims is not None and _same(sizes, target):
                    missing = len(target) - len(dims)
                    expanded[var] = [*[tvm.tirx.IntImm("int64", 1)] * missing, *dims]
    return expanded


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a.same_as(b) for a, b in zip(left, right, strict=True))
