"""Compute in float32 what TVM has no bfloat16 form of."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, dtype_of

# TVM cannot lower these in bfloat16.
_FLOAT32_ONLY = ("nn.layer_norm", "nn.instance_norm", "power")


def widen_bfloat16(model: Model) -> Model:
    """Cast around normalisations and powers in bfloat16; squares and cubes become products."""
    return MainRewriter(model).run(_rule)


def _rule(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if dtype_of(var) != "bfloat16" or not any(call_of(expr, name) for name in _FLOAT32_ONLY):
        return None
    if call_of(expr, "power"):
        base, exponent = expr.args[0], rewriter.scalar(expr.args[1])
        if exponent in (2.0, 3.0):
            square = relax.op.multiply(base, base)
            return square if exponent == 2.0 else relax.op.multiply(rewriter.emit(square), base)
    operands = [_widened(rewriter, operand) for operand in expr.args]
    wide = rewriter.emit(relax.Call(expr.op, operands, expr.attrs, expr.ty_args))
    return relax.op.astype(wide, "bfloat16")


def _widened(rewriter: MainRewriter, operand: Any) -> Any:
    if isinstance(operand, tvm.ir.GenericConst):
        return relax.const(operand.value.numpy().astype(np.float32))
    value = rewriter.params.get(operand)
    if value is not None:
        layer = rewriter.layers[operand]
        return rewriter.add_param(value.astype(np.float32), operand.name, layer)
    return rewriter.emit(relax.op.astype(operand, "float32"))
