"""The walk that every pass over a `Model` shares: read `main` binding by binding, emit it again.

A pass is a function from `Model` to `Model`, because it changes weights (NumPy arrays outside the
module) together with the code that uses them; TVM's own passes see only the module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError
from ..model import Model

Rule = Callable[["MainRewriter", Any, Any], Any]


def main_of(mod: tvm.IRModule) -> relax.Function:
    """Return the Relax function `main` of a module.

    Raises
    ------
    ModelError
        When there is none.
    """
    for gvar, func in mod.functions_items():
        if gvar.name_hint == "main" and isinstance(func, relax.Function):
            return func
    raise ModelError("the module has no Relax function called 'main'")


def bindings_of(func: relax.Function) -> Iterator[Any]:
    """Yield the bindings of a function in order, whatever blocks they stand in."""
    for block in func.body.blocks:
        yield from block.bindings


def call_of(expr: Any, op_name: str) -> bool:
    """Say whether `expr` calls the operator `op_name` (without the leading ``relax.``)."""
    return (
        isinstance(expr, relax.Call)
        and isinstance(expr.op, tvm.ir.Op)
        and expr.op.name == f"relax.{op_name}"
    )


def map_operands(expr: Any, function: Callable[[Any], Any]) -> Any:
    """Rebuild one expression in A-normal form with `function` applied to each operand."""
    if isinstance(expr, relax.Call):
        args = [map_operands(arg, function) for arg in expr.args]
        if all(new is old for new, old in zip(args, expr.args, strict=True)):
            return expr
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([map_operands(item, function) for item in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(map_operands(expr.tuple_value, function), expr.index)
    return function(expr)


def operands_of(expr: Any) -> list[Any]:
    """List the leaves of one expression in A-normal form: variables, constants, shapes."""
    leaves: list[Any] = []

    def collect(leaf: Any) -> Any:
        leaves.append(leaf)
        return leaf

    map_operands(expr, collect)
    return leaves


def count_uses(func: relax.Function) -> Counter[Any]:
    """Count how often each variable is read; the function's result counts as one more."""
    uses: Counter[Any] = Counter()
    for binding in bindings_of(func):
        uses.update(leaf for leaf in operands_of(binding.value) if isinstance(leaf, relax.Var))
    uses.update(leaf for leaf in operands_of(func.body.body) if isinstance(leaf, relax.Var))
    return uses


def static_shape(expr: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor when every dimension is a number, else None."""
    dims = shape_of(expr)
    if dims is None or not all(isinstance(dim, tvm.tirx.IntImm) for dim in dims):
        return None
    return tuple(int(dim) for dim in dims)


def shape_of(expr: Any) -> tuple[Any, ...] | None:
    """Return the dimensions of a tensor, numbers and symbols, or None when they are unknown."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return None
    return tuple(ty.shape.values) if isinstance(ty.shape, relax.ShapeExpr) else None


def same_shape(left: Any, right: Any) -> bool:
    """Say whether two tensors provably have one shape."""
    a, b = shape_of(left), shape_of(right)
    if a is None or b is None or len(a) != len(b):
        return False
    analyzer = tvm.sym.Analyzer()
    return all(_same_dim(analyzer, x, y) for x, y in zip(a, b, strict=True))


def _same_dim(analyzer: Any, a: Any, b: Any) -> bool:
    if isinstance(a, tvm.tirx.IntImm) and isinstance(b, tvm.tirx.IntImm):
        return int(a) == int(b)
    return bool(analyzer.can_prove_equal(a, b))


def dtype_of(expr: Any) -> str:
    """Return the element type of a tensor as text, "" when it is unknown."""
    ty = expr.ty
    return str(ty.dtype) if isinstance(ty, relax.TensorType) and ty.dtype is not None else ""


def first_of_slice(variable: Any, call: Any) -> int | None:
    """Tell where a slice of neighbours along the last axis begins; None for anything else."""
    shape = static_shape(variable)
    if shape is None or not call_of(call, "strided_slice"):
        return None
    whole, axes = static_shape(call.args[0]), _integers(call.args[1])
    if whole is None or [axis % len(shape) for axis in axes] != [len(shape) - 1]:
        return None
    [first] = _integers(call.args[2])
    first = first + whole[-1] if first < 0 else first
    steps = _integers(call.args[4]) if len(call.args) > 4 else [1]
    inside = 0 <= first and first + shape[-1] <= whole[-1]
    return first if steps == [1] and inside else None


def _integers(expr: Any) -> list[int]:
    """Read a tuple of numbers."""
    return [int(getattr(field, "value", field)) for field in expr.fields]


def constant_of(expr: Any, params: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the value of a constant or of a weight by its name, None for anything else."""
    if isinstance(expr, tvm.ir.GenericConst):
        return np.asarray(expr.value.numpy())
    return params.get(expr.name) if isinstance(expr, relax.Var) else None


def number_in(value: np.ndarray | None) -> float | None:
    """Return the one number that an array holds, None when it holds more or there is none."""
    return float(value.reshape(())) if value is not None and value.size == 1 else None


def base_name(name: str) -> str:
    """Strip the version that `MainRewriter.add_param` appends to a weight's name."""
    return re.sub(r"__v\d+$", "", name)


class MainRewriter:
    """Emit a new `main` from the old one's bindings.

    Attributes
    ----------
    params : dict
        Weight variable -> its array. Rules add to it by `add_param`; what nothing reads is dropped.
    layers : dict
        Weight variable -> the user's layer name.
    uses : Counter
        How often each variable of the *old* function is read.
    results : set
        The variables of the old function that its result names.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.func = main_of(model.mod)
        self.uses = count_uses(self.func)
        self.results = {x for x in operands_of(self.func.body.body) if isinstance(x, relax.Var)}
        split = int(self.func.attrs["num_input"])
        self.inputs = list(self.func.params[:split])
        weights = list(self.func.params[split:])
        self.params: dict[Any, np.ndarray] = {var: model.params[var.name] for var in weights}
        self.layers: dict[Any, str] = {
            var: model.layer_names.get(var.name, var.name) for var in weights
        }
        self.remap: dict[Any, Any] = {}
        self._names = Counter(var.name for var in self.func.params)
        self._builder = relax.BlockBuilder(model.mod)

    def add_param(self, array: np.ndarray, name: str, layer: str) -> Any:
        """Make a new weight variable; its name gets a version when it is taken.

        Parameters
        ----------
        array : numpy.ndarray
            The value; a strided view is copied only when something still reads it at the end.
        """
        base = base_name(name)
        fresh, count = base, 1
        while self._names[fresh]:
            fresh, count = f"{base}__v{count}", count + 1
        self._names[fresh] += 1
        var = relax.Var(fresh, relax.TensorType(array.shape, str(array.dtype)))
        self.params[var] = array
        self.layers[var] = layer
        return var

    def emit(self, expr: Any, name: str = "") -> Any:
        """Emit one expression and return its variable, with its type known."""
        return self._builder.emit(expr, name)

    def match_cast(self, expr: Any, ty: Any) -> Any:
        """Give a value a type, which is checked at run time; symbols in it get their values."""
        return self._builder.match_cast(expr, ty)

    def lookup(self, var: Any) -> Any:
        """Return what a new variable is bound to; None for inputs and weights."""
        return self._builder.lookup_binding(var) if isinstance(var, relax.Var) else None

    def scalar(self, leaf: Any) -> float | None:
        """Return the one number that a constant or a weight holds, None for anything else."""
        if isinstance(leaf, tvm.ir.GenericConst) and isinstance(leaf.ty, relax.TensorType):
            return number_in(leaf.value.numpy())
        return number_in(self.params.get(leaf)) if isinstance(leaf, relax.Var) else None

    def substitute(self, expr: Any) -> Any:
        """Replace old variables by what stands for them now."""

        def replaced(leaf: Any) -> Any:
            return self.remap.get(leaf, leaf) if isinstance(leaf, relax.Var) else leaf

        return map_operands(expr, replaced)

    def run(self, rule: Rule) -> Model:
        """Walk all bindings and return the new model, without dead bindings and weights.

        Parameters
        ----------
        rule : callable
            ``rule(rewriter, var, expr)``, with the old variable and the expression over new
            variables; it returns what stands for the variable from here on: a variable, a constant
            or an expression that is then emitted. None emits `expr` as it is.
        """
        self._builder.begin_scope([*self.inputs, *self.params])
        self._builder._begin_dataflow_block()
        for binding in bindings_of(self.func):
            self._rewrite(binding, rule)
        output = self._builder.emit_output(self.substitute(self.func.body.body))
        block = self._builder._end_block()
        self._builder.end_scope()
        return self._close(block, output)

    def _rewrite(self, binding: Any, rule: Rule) -> None:
        expr = self.substitute(binding.value)
        if isinstance(binding, relax.MatchCast):
            self.remap[binding.var] = self.match_cast(expr, binding.ty)
            return
        result = rule(self, binding.var, expr)
        if result is None:
            result = expr
        if not isinstance(result, relax.Var | tvm.ir.GenericConst | relax.ShapeExpr):
            result = self.emit(result, binding.var.name)
        self.remap[binding.var] = result

    def _close(self, block: Any, output: Any) -> Model:
        bindings, used = _live_bindings(block.bindings, output)
        body = self._builder.normalize(relax.SeqExpr([relax.DataflowBlock(bindings)], output))
        kept = [var for var in self.params if var in used]
        func = relax.Function([*self.inputs, *kept], body, is_pure=True)
        for key, value in dict(self.func.attrs or {}).items():
            if key != "params":
                func = func.with_attr(key, value)
        return replace(
            self.model,
            mod=with_main(self.model.mod, func),
            params={var.name: np.asarray(self.params[var], order="C") for var in kept},
            layer_names={var.name: self.layers[var] for var in kept},
        )


def with_main(mod: tvm.IRModule, func: relax.Function) -> tvm.IRModule:
    """Return the module with another `main`; its other functions and attributes stay."""
    functions = {
        gvar: (func if gvar.name_hint == "main" else other) for gvar, other in mod.functions_items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _live_bindings(bindings: Iterable[Any], output: Any) -> tuple[list[Any], set[Any]]:
    live = {output}
    kept: list[Any] = []
    for binding in reversed(list(bindings)):
        # A match_cast defines symbols that types further down may name.
        if binding.var in live or isinstance(binding, relax.MatchCast):
            kept.append(binding)
            live.update(x for x in operands_of(binding.value) if isinstance(x, relax.Var))
    return kept[::-1], live
