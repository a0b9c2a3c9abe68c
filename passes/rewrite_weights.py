"""Replace each planned operator, with what is fused behind it, by one call of its kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..model import Model
from ..ops.base import product
from .collect_weights import FusedSite


@dataclass(frozen=True)
class KernelCall:
    """A built kernel and the arrays that stand for its weight.

    `symbol` names the function in the module; calls with the same symbol share one function.
    """

    symbol: str
    function: Any
    arrays: Sequence[np.ndarray]


def rewrite_weights(
    model: Model, sites: Sequence[FusedSite], calls: Mapping[str, KernelCall]
) -> tvm.IRModule:
    """Emit `main` anew with kernels in the place of operators.

    Parameters
    ----------
    model : Model
        In canonical form: one dataflow block.
    sites : sequence of FusedSite
        What `collect_weights` found.
    calls : mapping of str to KernelCall
        By the name of the site's binding. Sites without an entry stay as they are.

    Returns
    -------
    tvm.IRModule
        Weights that no kernel packed are still parameters of `main`.
    """
    function = model.mod["main"]
    module, symbols = _add_functions(model.mod, calls)
    starts: dict[int, FusedSite] = {}
    dropped: set[int] = set()
    for fused_site in sites:
        if fused_site.site.binding in calls:
            starts[fused_site.fused.result] = fused_site
            dropped |= fused_site.fused.members
    blocks, position = [], 0
    for block in function.body.blocks:
        bindings: list[Any] = []
        for binding in block.bindings:
            if position in starts:
                fused_site = starts[position]
                call = calls[fused_site.site.binding]
                bindings += _emit_call(model, fused_site, call, symbols, binding.var)
            elif position not in dropped:
                bindings.append(binding)
            position += 1
        blocks.append(type(block)(bindings))
    body = relax.SeqExpr(blocks, function.body.body)
    rewritten = relax.Function(
        function.params, body, function.ret_ty, function.is_pure, function.attrs
    )
    module.update_func(module.get_global_var("main"), rewritten)
    return relax.transform.Normalize()(module)


def _add_functions(
    module: tvm.IRModule, calls: Mapping[str, KernelCall]
) -> tuple[tvm.IRModule, dict[str, Any]]:
    builder = relax.BlockBuilder(module)
    symbols: dict[str, Any] = {}
    for call in calls.values():
        if call.symbol not in symbols:
            function = call.function.with_attr("global_symbol", call.symbol)
            symbols[call.symbol] = builder.add_func(function, call.symbol)
    return builder.get(), symbols


def _emit_call(
    model: Model,
    fused_site: FusedSite,
    call: KernelCall,
    symbols: Mapping[str, Any],
    result: Any,
) -> list[Any]:
    """Bind the kernel's call to `result`; matmuls see their activations as matrices."""
    bindings: list[Any] = []

    def bind(expression: Any, name: str) -> Any:
        variable = relax.DataflowVar(f"{result.name}_{name}", expression.ty)
        bindings.append(relax.VarBinding(variable, expression))
        return variable

    def as_matrix(value: Any, name: str) -> Any:
        shape = list(value.ty.shape)
        if not is_matmul or len(shape) == 2:
            return value
        return bind(_typed_reshape(value, [product(shape[:-1]), shape[-1]]), name)

    is_matmul = fused_site.site.workload.op == "matmul"
    data = as_matrix(fused_site.data, "x")
    fused = fused_site.fused
    arguments = [data]
    arguments += [relax.const(array) for array in call.arrays]
    arguments += [relax.const(model.params[name].reshape(-1)) for name in fused.channels]
    arguments += [as_matrix(tensor, f"t{i}") for i, tensor in enumerate(fused.tensors)]
    shape = list(result.ty.shape)
    if is_matmul and len(shape) != 2:
        out_ty = relax.TensorType([product(shape[:-1]), shape[-1]], "float32")
        matrix = bind(_typed_call(symbols[call.symbol], arguments, out_ty), "y")
        bindings.append(relax.VarBinding(result, relax.op.reshape(matrix, shape)))
    else:
        out_ty = relax.TensorType(shape, "float32")
        bindings.append(
            relax.VarBinding(result, _typed_call(symbols[call.symbol], arguments, out_ty))
        )
    return bindings


def _typed_call(symbol: Any, arguments: Sequence[Any], out_ty: Any) -> Any:
    call = relax.call_tir(symbol, relax.Tuple(list(arguments)), out_ty=out_ty)
    relax.expr._update_type(call, out_ty)
    return call


def _typed_reshape(value: Any, shape: Sequence[Any]) -> Any:
    call = relax.op.reshape(value, list(shape))
    relax.expr._update_type(call, relax.TensorType(list(shape), "float32"))
    return call
