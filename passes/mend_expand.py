"""Let an Expand whose shape is data broadcast both ways, as ONNX has it and TVM's importer not."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, bindings_of, call_of, main_of, shape_of


def mend_expand(model: Model) -> Model:
    """Keep a size of the tensor where the shape that comes in as data has a 1.

    Without this the result would lack the rows that the shape does not ask for.
    """
    expanded = _expanded(main_of(model.mod))
    if not expanded:
        return model

    def rule(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        dims = expanded.get(var)
        if dims is None:
            return None
        asked = expr.args[0]
        sizes = rewriter.emit(relax.op.shape_to_tensor(relax.ShapeExpr(dims)))
        stretches = rewriter.emit(relax.op.equal(sizes, relax.const(1, "int64")))
        mended = rewriter.emit(relax.op.where(stretches, asked, sizes))
        return relax.op.tensor_to_shape(mended)

    return MainRewriter(model).run(rule)


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
