"""Replace calls of exp, erf, tanh and sigmoid by polynomials that LLVM can vectorise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import te, tirx

from ..schedules.x86 import vector_math

# Up to the fourth power; rounding errors add up with every product.
_LARGEST_POWER = 16

# Intrinsic -> replacement; each of the left ones is a scalar call into libm.
REPLACEMENTS: dict[str, Callable[[Any, int], Any]] = {
    "tirx.exp": vector_math.exp,
    "tirx.erf": vector_math.erf,
    "tirx.tanh": vector_math.tanh,
    "tirx.sigmoid": vector_math.sigmoid,
}


# Functions that TVM has no intrinsic for stand as external calls until they are replaced.
_EXTERNAL: dict[str, Callable[[Any, int], Any]] = {"tvm_sparse.gelu": vector_math.gelu}


def _gelu_by_erf(x: Any, lanes: int) -> Any:
    half, root = (tirx.const(value, str(x.ty)) for value in (0.5, math.sqrt(0.5)))
    return half * x * (tirx.const(1.0, str(x.ty)) + tirx.erf(x * root))


# The same without names for values.
_NAMELESS: dict[str, Callable[[Any, int], Any]] = {"tvm_sparse.gelu": _gelu_by_erf}


def _legalize_gelu(builder: Any, call: Any) -> Any:
    """Leave GELU whole: written as its formula, it takes an erf that is better than needed."""
    x = call.args[0]
    if str(x.ty.dtype) != "float32":
        return call.op.get_attr("FLegalize")(builder, call)

    def gelu(x: Any) -> Any:
        return te.compute(
            x.shape,
            lambda *at: tirx.call_pure_extern("float32", "tvm_sparse.gelu", x[at]),
            name="gelu",
        )

    return builder.call_te(gelu, x)


# For `LegalizeOps`: operator -> how it becomes TensorIR, where TVM's own way is slow.
LEGALIZATIONS: dict[str, Callable[[Any, Any], Any]] = {"relax.nn.gelu": _legalize_gelu}


def _power(x: Any, exponent: Any, lanes: int) -> Any | None:
    """Rewrite x ** (n / 4) by square roots and products, as local response norm needs it."""
    if isinstance(exponent, tirx.Broadcast):
        exponent = exponent.value
    if not isinstance(exponent, tirx.FloatImm):
        return None
    quarters = float(exponent.value) * 4
    if quarters != int(quarters) or not 1 <= abs(quarters) <= _LARGEST_POWER:
        return None
    return vector_math.power_of_quarters(x, int(quarters), lanes)


def replace_math_calls(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace the calls of one function; only float32 ones, whose errors are known.

    Polynomials name values, and TVM's legalisation of bfloat16 passes named values by: where a
    function has any of that type, calls of intrinsics stay.
    """
    named = not _has_bfloat16(function)

    def replace(call: Any) -> Any:
        name, lanes = getattr(call.op, "name", None), _float32_lanes(call)
        if not lanes or (not named and name != "tirx.call_pure_extern"):
            return call
        if name == "tirx.pow":
            power = _power(call.args[0], call.args[1], lanes)
            return call if power is None else power
        if name == "tirx.call_pure_extern":
            known = _EXTERNAL if named else _NAMELESS
            formula = known.get(getattr(call.args[0], "value", ""))
            return call if formula is None else formula(call.args[1], lanes)
        return REPLACEMENTS[name](call.args[0], lanes) if name in REPLACEMENTS else call

    body = tvm_ffi.structural_map(function.body, (tvm.ir.Call, replace))
    return function if body.same_as(function.body) else function.with_body(body)


def _has_bfloat16(function: tirx.PrimFunc) -> bool:
    types: set[str] = set()

    def note(expression: Any) -> None:
        types.add(str(expression.ty))

    tvm_ffi.structural_walk(function.body, ((tvm.ir.TensorLoad, tirx.Cast), note))
    return any(name.startswith("bfloat16") for name in types)


def _float32_lanes(call: Any) -> int:
    kind = str(call.ty)
    if kind == "float32":
        return 1
    return int(kind[len("float32x") :]) if kind.startswith("float32x") else 0


@tvm.transform.module_pass(opt_level=0, name="VectorizeMath")
class VectorizeMath:
    """Replace elementary functions in every TensorIR function of a module."""

    def transform_module(
        self, mod: tvm.IRModule, context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Rewrite the module."""
        changed = {
            name: replace_math_calls(function)
            for name, function in mod.functions_items()
            if isinstance(function, tirx.PrimFunc)
        }
        result = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
        for name, function in changed.items():
            result.update_func(name, function)
        return result
