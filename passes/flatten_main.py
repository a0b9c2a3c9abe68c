"""Bring `main` into one dataflow block in A-normal form; say why when that cannot be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from ..errors import ModelError
from ..model import Model
from .rewrite_main import MainRewriter, bindings_of, call_of, main_of, operands_of


def flatten_main(model: Model) -> Model:
    """Inline nested sequences and blocks, resolve tuples, and drop dropout.

    Raises
    ------
    ModelError
        When `main` branches, calls something impure or holds local functions.
    """
    model = replace(model, mod=relax.transform.Normalize()(model.mod))
    _refuse_control_flow(main_of(model.mod))
    return MainRewriter(model).run(_resolve_tuple)


def _refuse_control_flow(func: relax.Function) -> None:
    for binding in bindings_of(func):
        value = binding.value
        if isinstance(value, relax.If):
            raise ModelError(
                f"'main' branches at run time ('{binding.var.name}'); a graph without If is needed"
            )
        if any(isinstance(leaf, relax.Function | relax.SeqExpr) for leaf in operands_of(value)):
            raise ModelError(
                f"'main' defines the local function '{binding.var.name}'; lift it out with "
                "relax.transform.LambdaLift first"
            )
    if not func.is_pure or relax.analysis.contains_impure_call(func):
        raise ModelError("'main' calls something with side effects, so it cannot be rewritten")


def _resolve_tuple(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if not isinstance(expr, relax.TupleGetItem):
        return None
    source = rewriter.lookup(expr.tuple_value)
    if call_of(source, "nn.dropout") and expr.index == 0:
        return source.args[0]
    if isinstance(source, relax.Tuple):
        return source.fields[expr.index]
    return None
