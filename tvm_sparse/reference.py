"""The dense reference: the loaded model with every weighted layer computed by NumPy in float64.

Activations keep the model's type: a layer's result is rounded to it once. What has no weight runs
as TVM runs it.
"""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .dtypes import is_float, numpy_dtype
from .errors import InputError
from .float64 import ConvAttributes, conv2d64, matmul64
from .model import Model, TensorSpec
from .runtime import CompiledModule, aligned_empty, array_of, check_inputs, tensor_of
from .targets import resolve_target

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}

_numbers = itertools.count()


@dataclass(frozen=True)
class Capture:
    """What went into one weighted layer and came out of it, in one run of the reference.

    Attributes
    ----------
    name : str
        The variable that the layer's result is bound to in `Model.mod`.
    param : str
        The weight's parameter.
    x, weight : numpy.ndarray
        The operands.
    y64 : numpy.ndarray
        W @ x in float64.
    conv : ConvAttributes or None
        None for a matmul, whose weight is (..., inputs, outputs).
    """

    name: str
    param: str
    x: np.ndarray
    weight: np.ndarray
    y64: np.ndarray
    conv: ConvAttributes | None = None

    @property
    def result(self) -> np.ndarray:
        """W @ x as the following layers saw it, of x's dtype."""
        return self.y64.astype(self.x.dtype)

    @property
    def terms(self) -> np.ndarray:
        """Products that each output sums, its nonzero weights; broadcasts with the result."""
        if self.conv is None:
            counts = np.count_nonzero(self.weight, axis=-2 if self.weight.ndim > 1 else 0)
            return np.asarray(counts, np.int64)[..., None, :] if np.ndim(counts) > 1 else counts
        counts = np.count_nonzero(self.weight, axis=(1, 2, 3))
        return np.asarray(counts, np.int64)[:, None, None]

    def reference64(self, rows: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Give the result in float64, and the magnitudes that bound a float32 result's error.

        Parameters
        ----------
        rows : sequence of int, optional
            The output features or channels to compute; all by default.

        Returns
        -------
        y : numpy.ndarray
            W @ x in float64.
        magnitude : numpy.ndarray
            |W| @ |x|, of the same shape; see `check.dot_bound` and `check.half_dot_bound`.
        """
        x, weight = np.abs(self.x), np.abs(self.weight)
        axis = -1 if self.conv is None else 1
        y = self.y64 if rows is None else np.take(self.y64, list(rows), axis=axis)
        if self.conv is None:
            return y, matmul64(x, weight if rows is None else weight[..., list(rows)])
        if rows is None:
            return y, conv2d64(x, weight, self.conv)
        if self.conv.groups == 1:
            return y, conv2d64(x, weight[list(rows)], self.conv)
        return y, np.take(conv2d64(x, weight, self.conv), list(rows), axis=1)


@dataclass(frozen=True)
class ReferenceRun:
    """Outputs of one run, and the captured layers by the name of their result's variable."""

    outputs: list[np.ndarray]
    captures: dict[str, Capture]


@dataclass(frozen=True)
class _Site:
    name: str
    param: str
    weight: np.ndarray
    conv: ConvAttributes | None

    def compute(self, x: np.ndarray) -> np.ndarray:
        if self.conv is None:
            return matmul64(x, self.weight)
        return conv2d64(x, self.weight, self.conv)


@dataclass
class _State:
    """What the registered function works on: not `Reference`, so that that can be collected."""

    sites: dict[str, _Site] = field(default_factory=dict)
    captures: dict[str, Capture] | None = None

    def call(self, name: str, tensor: Any) -> Any:
        import tvm

        site = self.sites[str(name)]
        x = array_of(tensor)
        y64 = site.compute(x)
        if self.captures is not None:
            # A copy: the runtime reuses the buffer for later activations.
            x = np.array(x)
            self.captures[site.name] = Capture(
                site.name, site.param, x, site.weight, y64, site.conv
            )
        return tvm.runtime.tensor(y64.astype(x.dtype))


class Reference:
    """A model whose matmuls and convolutions with weights run in NumPy, and all else in stock TVM.

    Parameters
    ----------
    model : Model
        A loaded model. It is not changed.
    """

    def __init__(self, model: Model) -> None:
        import tvm
        import tvm_ffi
        from tvm import relax

        self._inputs = model.inputs
        self._state = _State()
        name = f"tvm_sparse.reference.{next(_numbers)}"
        tvm.register_global_func(name, self._state.call, override=True)
        weakref.finalize(self, tvm_ffi.registry.remove_global_func, name)
        mod, params = _outline(model, name, self._state.sites)
        self._params = [_aligned(model.params[param]) for param in params]
        target = resolve_target("native")
        executable = tvm.compile(mod, target, relax_pipeline=relax.get_default_pipeline(target))
        self._machine = relax.VirtualMachine(executable, tvm.cpu())

    @property
    def layers(self) -> tuple[str, ...]:
        """The variables of the layers that a run captures, in the model's order."""
        return tuple(self._state.sites)

    def run(self, inputs: Sequence[np.ndarray], capture: bool = True) -> ReferenceRun:
        """Run the model.

        Parameters
        ----------
        inputs : sequence of numpy.ndarray
            In calling order.
        capture : bool
            Keep what went in and out of every weighted layer.

        Raises
        ------
        InputError
            When an input does not fit.
        """
        if len(inputs) != len(self._inputs):
            noun = "input" if len(self._inputs) == 1 else "inputs"
            raise InputError(
                f"the model takes {len(self._inputs)} {noun}, and the call gives {len(inputs)}"
            )
        check_inputs(self._inputs, inputs)
        self._state.captures = {} if capture else None
        arguments = [_aligned(value) for value in inputs]
        result = self._machine["main"](*arguments, *self._params)
        outputs = [np.array(array_of(tensor)) for tensor in _flatten(result)]
        captures, self._state.captures = self._state.captures or {}, None
        return ReferenceRun(outputs, captures)


def random_inputs(
    model: Model | CompiledModule, seed: int = 0, symbolic: Mapping[str, int] | None = None
) -> list[np.ndarray]:
    """Make inputs that every model can take.

    Parameters
    ----------
    model : Model or CompiledModule
        Whose inputs to fill.
    seed : int
        The same seed gives the same inputs.
    symbolic : mapping of str to int, optional
        Sizes of symbolic dimensions. The others become small primes, each another one.

    Returns
    -------
    list of numpy.ndarray
        Floating-point inputs are standard normal. Integers are 0 or 1, which every embedding table
        and every mask can take.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(symbolic or {})
    return [_random_input(spec, sizes, rng) for spec in model.inputs]


def _outline(model: Model, function: str, sites: dict[str, _Site]) -> tuple[Any, list[str]]:
    """Replace weighted layers by calls of `function`; return the module and the parameters left."""
    import tvm
    from tvm import relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    main = model.mod["main"]
    inputs = main.params[: len(model.inputs)]
    weights = {param: param.name for param in main.params[len(model.inputs) :]}

    @mutator
    class Outline(PyExprMutator):
        """Works by bindings, because a layer is known by the variable it is bound to."""

        def visit_var_binding_(self, binding: Any) -> None:
            site = _site(binding, weights, model.params)
            if site is None:
                super().visit_var_binding_(binding)
                return
            key = _unique(site.name, sites)
            sites[key] = _Site(key, site.param, site.weight, site.conv)
            x = self.visit_expr(binding.value.args[0])
            call = relax.call_pure_packed(
                function, tvm.ir.StringImm(key), x, ty_args=binding.var.ty
            )
            self.set_var_remap(binding.var, self.builder_.emit(call, binding.var.name))

    mod = tvm.IRModule(model.mod.functions)
    body = Outline(mod).visit_expr(main.body)
    used = set(relax.analysis.free_vars(body))
    left = [param for param in weights if param in used]
    rewritten = relax.Function([*inputs, *left], body, main.ret_ty, main.is_pure)
    mod["main"] = rewritten.with_attr("global_symbol", "main")
    return mod, [weights[param] for param in left]


def _site(
    binding: Any, weights: Mapping[Any, str], values: Mapping[str, np.ndarray]
) -> _Site | None:
    import tvm

    call = binding.value
    operator = getattr(call, "op", None)
    if not isinstance(operator, tvm.ir.Op) or operator.name not in _SITES:
        return None
    param = weights.get(call.args[1])
    if param is None or not is_float(values[param].dtype):
        return None
    supported, conv = _SITES[operator.name](call)
    return _Site(binding.var.name, param, values[param], conv) if supported else None


def _matmul_site(_call: Any) -> tuple[bool, ConvAttributes | None]:
    return True, None


def _conv_site(call: Any) -> tuple[bool, ConvAttributes | None]:
    attrs = call.attrs
    layouts = attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout
    if layouts != ("NCHW", "OIHW", "NCHW"):
        return False, None
    strides, padding, dilation = (
        tuple(int(value) for value in values)
        for values in (attrs.strides, attrs.padding, attrs.dilation)
    )
    return True, ConvAttributes(
        (strides[0], strides[-1]),
        (padding[0], padding[1], padding[2], padding[3]),
        (dilation[0], dilation[-1]),
        int(attrs.groups),
    )


_SITES: dict[str, Callable[[Any], tuple[bool, ConvAttributes | None]]] = {
    "relax.matmul": _matmul_site,
    "relax.nn.conv2d": _conv_site,
}


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    candidates: Iterator[str] = (f"{name}#{i}" for i in itertools.count(2))
    return name if name not in taken else next(key for key in candidates if key not in taken)


def _aligned(value: np.ndarray) -> Any:
    array = aligned_empty(value.shape, value.dtype.newbyteorder("="))
    np.copyto(array, value)
    return tensor_of(array)


def _flatten(result: Any) -> list[Any]:
    if hasattr(result, "__dlpack__"):
        return [result]
    return [tensor for item in result for tensor in _flatten(item)]


def _random_input(spec: TensorSpec, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = tuple(dim if isinstance(dim, int) else _size(dim, sizes) for dim in spec.shape)
    dtype = numpy_dtype(spec.dtype)
    if is_float(spec.dtype):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def _size(dim: str, sizes: dict[str, int]) -> int:
    """Look a dimension up, work it out if it is arithmetic, or give it a prime of its own."""
    if dim not in sizes:
        sizes[dim] = _evaluate(dim, sizes)
    return sizes[dim]


def _evaluate(dim: str, sizes: dict[str, int]) -> int:
    try:
        expression = ast.parse(dim, mode="eval").body
    except SyntaxError:
        return _next_prime(sizes)
    return _value(expression, sizes) if isinstance(expression, ast.BinOp) else _next_prime(sizes)


def _value(node: ast.expr, sizes: dict[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return _size(node.id, sizes)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    raise InputError(f"the size of the dimension '{ast.unparse(node)}' is not known; state it")


def _next_prime(sizes: Mapping[str, int]) -> int:
    for candidate in itertools.count(2):
        prime = all(candidate % divisor for divisor in range(2, candidate))
        if prime and candidate not in sizes.values():
            return candidate
    raise AssertionError("there are infinitely many primes")
