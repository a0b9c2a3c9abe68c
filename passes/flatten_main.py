"""Bring `main` into one dataflow block in A-normal form; say why when that cannot be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..errors import ModelError
from ..model import Model
from .lift_branches import lift_branches
from .rewrite_main import MainRewriter, bindings_of, call_of, main_of, operands_of, with_main


def flatten_main(model: Model) -> Model:
    """Inline nested sequences and blocks, lift branches, resolve tuples, and drop dropout.

    Raises
    ------
    ModelError
        When `main` calls something impure or holds local functions.
    """
    mod = relax.transform.Normalize()(model.mod)
    main = _NameBuiltins(mod).visit_expr(main_of(mod))
    _refuse_impure(main)
    model = lift_branches(replace(model, mod=with_main(mod, main)))
    return MainRewriter(model).run(_resolve_tuple)


# Functions of the runtime without side effects that TVM's importers call by name, which says
# nothing about their purity.
_BUILTINS = {"vm.builtin.tensor_to_shape": relax.op.tensor_to_shape}


@mutator
class _NameBuiltins(PyExprMutator):
    """Calls the operator in place of the runtime's function."""

    def visit_call_(self, call: Any) -> Any:
        """Replace the call of a function in `_BUILTINS`."""
        call = self.visit_expr_post_order(call)
        operator = _BUILTINS.get(getattr(call.op, "global_symbol", ""))
        return call if operator is None else operator(*call.args)


def _refuse_impure(func: relax.Function) -> None:
    for binding in bindings_of(func):
        leaves = operands_of(binding.value)
        if any(isinstance(leaf, relax.Function | relax.SeqExpr) for leaf in leaves):
            raise ModelError(
                f"'main' defines the local function '{binding.var.name}'; lift it out with "
                "relax.transform.LambdaLift first"
            )
    if relax.analysis.contains_impure_call(func):
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
