"""Tell which outputs of `main` are memory of their own, so that a call need not copy them."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

# Operators whose result lies in their operand's memory.
_VIEWS = ("relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims")


def find_fresh_outputs(mod: tvm.IRModule) -> tuple[bool, ...]:
    """Say for each output of `main`, in order, whether a kernel writes it anew in every call.

    An output that is an input, a constant, a view of one of these or the same value as another
    output is not, and neither is one whose origin is not understood.
    """
    function = mod["main"]
    values: dict[str, Any] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            values[binding.var.name] = getattr(binding, "value", None)
    result = _resolve(function.body.body, values)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [function.body.body]
    seen: set[str] = set()
    return tuple(_is_fresh(field, values, seen) for field in fields)


def _resolve(expression: Any, values: dict[str, Any]) -> Any:
    while isinstance(expression, relax.Var) and isinstance(
        values.get(expression.name), (relax.Var, relax.Tuple)
    ):
        expression = values[expression.name]
    return expression


def _is_fresh(expression: Any, values: dict[str, Any], seen: set[str]) -> bool:
    while True:
        expression = _resolve(expression, values)
        if not isinstance(expression, relax.Var):
            return False
        call = values.get(expression.name)
        if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
            return False
        if call.op.name in _VIEWS:
            expression = call.args[0]
            continue
        fresh = call.op.name == "relax.call_tir" and expression.name not in seen
        seen.add(expression.name)
        return fresh
