"""Find every use of a weight in a canonical model, with what can be fused behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..dtypes import FLOAT_TYPES
from ..model import Model
from ..ops import OPERATORS, Operator, WeightSite
from ..ops.base import Recognised
from ..workload import Workload
from .fuse_epilogue import Body, FusedEpilogue, grow_epilogue
from .lift_branches import BRANCHES, calls_in, function_of
from .rewrite_main import dtype_of

*_FIRST_TYPES, _LAST_TYPE = FLOAT_TYPES
_KNOWN_TYPES = f"{', '.join(_FIRST_TYPES)} and {_LAST_TYPE} only"


@dataclass(frozen=True)
class FusedSite:
    """A weight site and the part of `main` that its kernel replaces.

    Attributes
    ----------
    site : WeightSite
        What plans and reports speak of.
    data : relax.Expr
        The activations.
    fused : FusedEpilogue
        The bindings that the kernel takes over, and the operands it needs.
    """

    site: WeightSite
    data: Any
    fused: FusedEpilogue


def collect_weights(model: Model) -> list[FusedSite]:
    """List the matmuls and convolutions of `main` that multiply by a weight parameter.

    Sites that no kernel can take are listed too; their `refusal` says why. Among them are those in
    functions that `main` calls: its branches at run time.
    """
    body = Body(model)
    found: list[FusedSite] = []
    used_names: dict[str, int] = {}
    taken: set[int] = set()
    for index, (variable, expression) in enumerate(body.bindings):
        operator = _operator_of(expression)
        if operator is None:
            found += _in_function(model, index, variable, expression, used_names)
            continue
        data, weight = expression.args[0], expression.args[1]
        left = _is_weight(data, model) and not _is_weight(weight, model)
        if left:
            data, weight = weight, data
        if not _is_weight(weight, model):
            continue
        value = model.params[weight.name]
        if left:
            recognised = Recognised(None, "the weight stands left of the activations")
        else:
            recognised = _refuse_types(value, variable, expression) or operator.recognise(
                expression, tuple(value.shape)
            )
        if recognised.geometry is None:
            fused = FusedEpilogue.nothing(index)
        else:
            fused = grow_epilogue(body, index, operator.channel_axis, taken)
            taken |= fused.members
        site = WeightSite(
            name=_unique(model.layer_names.get(weight.name, weight.name), used_names),
            param=weight.name,
            binding=variable.name,
            workload=Workload(operator.name, recognised.geometry, str(value.dtype), fused.epilogue)
            if recognised.geometry is not None
            else Workload(operator.name, None, str(value.dtype)),
            weight_shape=tuple(value.shape),
            refusal=recognised.refusal,
        )
        found.append(FusedSite(site, data, fused))
    return found


def _in_function(
    model: Model, index: int, variable: Any, call: Any, used_names: dict[str, int]
) -> list[FusedSite]:
    """List the layers of a function that `main` calls, all of them refused."""
    function = function_of(model.mod, call)
    if function is None:
        return []
    what = "a branch that is taken" if BRANCHES in (function.attrs or {}) else "a function called"
    refusal = f"it stands in {what} at run time; kernels replace layers of 'main' itself only"
    # What stands for an argument of `main` in there, transposed or not.
    origins = dict(zip(function.params, call.args, strict=True))
    found = []
    for inner, expression in calls_in(function):
        operator = _operator_of(expression)
        if operator is None:
            source = expression.args[0] if expression.args else None
            if isinstance(source, relax.Var) and source in origins:
                origins[inner] = origins[source]
            continue
        weights = [origins.get(operand) for operand in expression.args[1::-1]]
        weight = next((origin for origin in weights if _is_weight(origin, model)), None)
        if weight is None:
            continue
        value = model.params[weight.name]
        site = WeightSite(
            name=_unique(model.layer_names.get(weight.name, weight.name), used_names),
            param=weight.name,
            binding=f"{variable.name}/{inner.name}",
            workload=Workload(operator.name, None, str(value.dtype)),
            weight_shape=tuple(value.shape),
            refusal=refusal,
        )
        found.append(FusedSite(site, expression.args[0], FusedEpilogue.nothing(index)))
    return found


def _operator_of(expression: Any) -> Operator | None:
    if not isinstance(expression, relax.Call) or not isinstance(expression.op, tvm.ir.Op):
        return None
    return OPERATORS.get(expression.op.name)


def _is_weight(expression: Any, model: Model) -> bool:
    return isinstance(expression, relax.Var) and expression.name in model.params


def _refuse_types(value: np.ndarray, variable: Any, call: Any) -> Recognised | None:
    dtype = str(value.dtype)
    if dtype not in FLOAT_TYPES:
        return Recognised(None, f"the weight is {dtype}; kernels exist for {_KNOWN_TYPES}")
    for what, tensor in (("activations are", call.args[0]), ("result is", variable)):
        if dtype_of(tensor) != dtype:
            return Recognised(None, f"the {what} {dtype_of(tensor)}, and the weight is {dtype}")
    for tensor in (call.args[0], variable):
        if not isinstance(tensor.ty.shape, relax.ShapeExpr):
            return Recognised(None, "the shape of the activations is not known")
    return None


def _unique(name: str, used: dict[str, int]) -> str:
    used[name] = used.get(name, 0) + 1
    return name if used[name] == 1 else f"{name}#{used[name]}"
