"""Turn floating-point arrays that stand in the body into weight parameters."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ..dtypes import is_float
from ..model import Model
from .rewrite_main import MainRewriter, map_operands


def lift_weights(model: Model) -> Model:
    """Lift each float constant of one dimension or more; a constant used twice becomes one weight.

    Scalars, empty arrays and integer or boolean constants stay inline: operators read them while
    compiling. A lifted weight is named after the value that it first helps to compute. A parameter
    that is a scalar, empty or an integer array becomes inline.
    """
    lifted: dict[Any, Any] = {}

    def rule(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        def lift(leaf: Any) -> Any:
            if not is_weight_constant(leaf):
                return leaf
            if leaf not in lifted:
                array = leaf.value.numpy()
                lifted[leaf] = rewriter.add_param(array, f"{var.name}_weight", var.name)
            return lifted[leaf]

        return map_operands(expr, lift)

    rewriter = MainRewriter(model)
    for weight, array in rewriter.params.items():
        if array.ndim == 0 or not array.size or not is_float(array.dtype):
            rewriter.remap[weight] = relax.const(array, str(array.dtype))
    return rewriter.run(rule)


def is_weight_constant(leaf: Any) -> bool:
    """Say whether an operand is a floating-point constant with dimensions, none of them zero."""
    return (
        isinstance(leaf, tvm.ir.GenericConst)
        and isinstance(leaf.ty, relax.TensorType)
        and leaf.ty.ndim >= 1
        and is_float(leaf.ty.dtype)
        and 0 not in leaf.value.shape
    )
