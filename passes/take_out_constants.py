"""Have large constants of the virtual machine come from outside, where they need not be copied."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from ..weights import LEAST_BYTES, WEIGHTS_FUNCTION, nbytes


def take_out_constants(taken: list[Any]) -> Any:
    """Return the pass that takes tensors of `LEAST_BYTES` and more out of all Relax functions.

    It stands at the end of a pipeline: what it leaves is for the virtual machine, which copies the
    constants that it keeps itself. In their place, a function asks `WEIGHTS_FUNCTION` for all of
    them once a call.

    Parameters
    ----------
    taken : list of tvm.runtime.Tensor
        Filled with the constants, in the order in which the function has to return them.
    """

    @tvm.transform.module_pass(opt_level=0, name="tvm_sparse.TakeOutConstants")
    def run(mod: Any, _context: Any) -> Any:
        finder = _Finder()
        functions = {
            name: function
            for name, function in mod.functions_items()
            if isinstance(function, relax.Function)
        }
        for function in functions.values():
            finder.visit_expr(function)
        if not finder.found:
            return mod
        taken.extend(constant.value for constant in finder.found)
        taker = _Taker(mod, finder.found)
        for name, function in functions.items():
            taker.builder_.update_func(name, taker.take_from(function))
        return taker.builder_.get()

    return run


def _is_large(constant: Any) -> bool:
    value = constant.value
    return isinstance(value, tvm.runtime.Tensor) and nbytes(value) >= LEAST_BYTES


@visitor
class _Finder(PyExprVisitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def visit_generic_const_(self, constant: Any) -> None:
        """Note a large constant, once wherever it is used."""
        if _is_large(constant) and not any(constant.same_as(other) for other in self.found):
            self.found.append(constant)


@mutator
class _Taker(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, constants: list[Any]) -> None:
        super().__init__(mod)
        self.constants = constants
        self.type = relax.TupleType([constant.ty for constant in constants])
        self.weights: Any = None

    def take_from(self, function: Any) -> Any:
        """Rewrite one function; it asks for the weights first if it uses any."""
        self.weights = None
        function = self.visit_expr(function)
        if self.weights is None:
            return function
        call = relax.Call(relax.ExternFunc(WEIGHTS_FUNCTION), [], ty_args=[self.type])
        binding = relax.VarBinding(self.weights, self.builder_.normalize(call))
        first = relax.BindingBlock([binding])
        body = relax.SeqExpr([first, *function.body.blocks], function.body.body)
        whole = relax.Function(
            function.params, body, function.ret_ty, function.is_pure, function.attrs
        )
        return self.builder_.normalize(whole)

    def visit_generic_const_(self, constant: Any) -> Any:
        """Put an element of the weights in the place of a large constant."""
        if not _is_large(constant):
            return constant
        if self.weights is None:
            self.weights = relax.Var("weights", self.type)
        index = next(i for i, other in enumerate(self.constants) if constant.same_as(other))
        return self.builder_.emit(relax.TupleGetItem(self.weights, index))
