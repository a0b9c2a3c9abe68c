"""Move what is decided at run time out of `main`, which thereby stays one dataflow block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..model import Model
from .lift_weights import is_weight_constant
from .rewrite_main import MainRewriter, bindings_of, main_of

# The attribute of a function that holds nothing but branches.
BRANCHES = "tvm_sparse.branches"


def lift_branches(model: Model) -> Model:
    """Make a private function of each `If` of `main`, called with all that its branches read.

    Weights are arguments too, so that they are known to `main`. What the branches compute stays as
    it is; a note says so.
    """
    branches = [b for b in bindings_of(main_of(model.mod)) if isinstance(b.value, relax.If)]
    if not branches:
        return model
    builder = relax.BlockBuilder(model.mod)
    calls: dict[Any, tuple[Any, list[Any]]] = {}
    for binding in branches:
        function, arguments = _outline(binding)
        symbol = builder.add_func(function, f"{binding.var.name}_branches")
        calls[binding.var] = symbol, arguments
    notes = [
        f"'{binding.var.name}' branches at run time, and what stands in the branches stays dense"
        for binding in branches
        if calls_in(builder.get()[calls[binding.var][0]])
    ]
    model = replace(model, mod=builder.get(), notes=(*model.notes, *notes))

    def rule(rewriter: MainRewriter, var: Any, _expr: Any) -> Any:
        if var not in calls:
            return None
        symbol, arguments = calls[var]
        return rewriter.substitute(relax.Call(symbol, arguments))

    return MainRewriter(model).run(rule)


def _outline(binding: Any) -> tuple[relax.Function, list[Any]]:
    """Make a function of an If; return it with its arguments."""
    lifter = _WeightsToVariables()
    value = lifter.visit_expr(binding.value)
    known = [*lifter.variables, *relax.analysis.free_symbolic_vars(value)]
    free = [var for var in relax.analysis.free_vars(value) if var not in known]
    params = [*free, *lifter.variables]
    arguments = [*free, *lifter.variables.values()]
    result = relax.Var(binding.var.name, binding.var.ty)
    block = relax.BindingBlock([relax.VarBinding(result, value)])
    body = relax.SeqExpr([block], result)
    function = relax.Function(params, body, binding.var.ty, is_pure=True)
    sizes = list(relax.analysis.free_symbolic_vars(function))
    if sizes:
        # Sizes that no operand has: the function cannot know them otherwise.
        params.append(relax.Var("sizes", relax.ShapeType(sizes)))
        arguments.append(relax.ShapeExpr(sizes))
        function = relax.Function(params, body, binding.var.ty, is_pure=True)
    function = relax.utils.copy_with_new_vars(function)
    return function.with_attr(BRANCHES, True), arguments


@mutator
class _WeightsToVariables(PyExprMutator):
    """Puts variables in the place of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: dict[Any, Any] = {}

    def visit_generic_const_(self, constant: Any) -> Any:
        """Replace a weight."""
        if not is_weight_constant(constant):
            return constant
        var = relax.Var(f"weight_{len(self.variables)}", constant.ty)
        self.variables[var] = constant
        return var


def calls_in(function: relax.Function) -> list[tuple[Any, Any]]:
    """List the bound calls of a function, those in its branches too, with their variables."""
    found: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.SeqExpr):
            for block in node.blocks:
                pairs = [(b.var, getattr(b, "value", None)) for b in block.bindings]
                found.extend((v, e) for v, e in pairs if isinstance(e, relax.Call))

    relax.analysis.post_order_visit(function.body, visit)
    return found


def function_of(mod: tvm.IRModule, call: Any) -> relax.Function | None:
    """Return the Relax function of the module that an expression calls, None if it calls none."""
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.GlobalVar):
        return None
    function = mod[call.op]
    return function if isinstance(function, relax.Function) else None
