"""Evaluate with NumPy what is computed from weights alone.

TVM's FoldConstant legalises and compiles one kernel per operator (10-15 s on ResNet-50) and
copies a weight as often as it is broadcast. Here a transpose or broadcast is a strided view, made
contiguous once, at the end, if something still reads it; a matmul looks through a broadcast weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..dtypes import is_float
from ..model import Model
from .rewrite_main import MainRewriter, call_of, operands_of, same_shape

# A result that is larger than everything it comes from is folded only up to this many elements.
GROWTH_LIMIT = 1 << 16
# A product of two constants is folded only up to this many multiply-adds.
PRODUCT_LIMIT = 1 << 26

Evaluator = Callable[[list[np.ndarray], Any], "np.ndarray | None"]


def fold_weight_transforms(model: Model) -> Model:
    """Replace operators over constants by new weights, or by inline constants for integers.

    Quantised weights stay: ``dequantize(int8)`` and a cast of int8 or uint8 arrays are not folded.
    """
    return MainRewriter(model).run(_Folder())


class _Folder:
    """The rule of this pass.

    `virtual` holds broadcast weights that are too large to store: their operator stays in the body
    (and dies if nobody needs it), while a matmul may look through to the weight.
    """

    def __init__(self) -> None:
        self.virtual: dict[Any, np.ndarray] = {}
        self.origin: dict[Any, Any] = {}
        # A weight that several layers transform alike is stored once.
        self.done: dict[Any, Any] = {}

    def __call__(self, rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op):
            return None
        if call_of(expr, "shape_to_tensor"):
            return _known_shape(rewriter, expr)
        if call_of(expr, "where"):
            expr = self._decide(rewriter, var, expr)
            if not isinstance(expr, relax.Call):
                return expr
        if call_of(expr, "matmul") and len(expr.args) == 2:
            expr = self._look_through(rewriter, expr)
        evaluate = _EVALUATORS.get(expr.op.name.removeprefix("relax."))
        arrays = self._arrays(rewriter, expr) if evaluate is not None else None
        if evaluate is None or arrays is None:
            return expr
        key = _key(expr)
        if key not in self.done:
            with np.errstate(all="ignore"):
                result = evaluate(arrays, expr)
            if result is None:
                return expr
            self.done[key] = self._settle(rewriter, var, expr, arrays, result)
        return self.done[key]

    def _array(self, rewriter: MainRewriter, leaf: Any) -> np.ndarray | None:
        if isinstance(leaf, tvm.ir.GenericConst) and isinstance(leaf.ty, relax.TensorType):
            return leaf.value.numpy()
        if isinstance(leaf, relax.Var):
            found = rewriter.params.get(leaf)
            return self.virtual.get(leaf) if found is None else found
        return None

    def _arrays(self, rewriter: MainRewriter, expr: Any) -> list[np.ndarray] | None:
        fields = expr.args[0].fields if isinstance(expr.args[0], relax.Tuple) else expr.args
        tensors = [
            leaf for leaf in fields if isinstance(getattr(leaf, "ty", None), relax.TensorType)
        ]
        arrays = [self._array(rewriter, leaf) for leaf in tensors]
        known = [array for array in arrays if array is not None]
        return known if known and len(known) == len(arrays) else None

    def _settle(
        self, rewriter: MainRewriter, var: Any, expr: Any, arrays: list[np.ndarray], result: Any
    ) -> Any:
        result = np.asarray(result)
        sources = [leaf for leaf in operands_of(expr) if leaf in rewriter.params]
        # A constant of the body, such as a pruning mask, has no layer but the variable it feeds.
        named = [leaf for leaf in sources if rewriter.layers[leaf] != var.name]
        source = next(iter(named or sources), None)
        if source is None:
            source = next((self.origin[x] for x in operands_of(expr) if x in self.origin), None)
        if result.size > max(GROWTH_LIMIT, *(_stored_size(array) for array in arrays)):
            if 0 not in result.strides:
                return expr
            kept = rewriter.emit(expr, var.name)
            self.virtual[kept] = result
            self.origin[kept] = source
            return kept
        if result.ndim == 0 or not is_float(result.dtype):
            return relax.const(
                np.ascontiguousarray(result).reshape(result.shape), str(result.dtype)
            )
        if source is None:
            return rewriter.add_param(result, f"{var.name}_weight", var.name)
        return rewriter.add_param(result, source.name, rewriter.layers[source])

    def _decide(self, rewriter: MainRewriter, var: Any, expr: Any) -> Any:
        """Take the branch of a `where` with a constant scalar condition (negative indices)."""
        condition = self._array(rewriter, expr.args[0])
        if condition is None or condition.ndim != 0:
            return expr
        chosen = expr.args[1] if bool(condition) else expr.args[2]
        return chosen if same_shape(chosen, var) else expr

    def _look_through(self, rewriter: MainRewriter, expr: Any) -> Any:
        data, leaf = expr.args
        weight = self._array(rewriter, leaf)
        if weight is None or weight.ndim <= 2 or isinstance(leaf, tvm.ir.GenericConst):
            return expr
        batch = zip(weight.shape[:-2], weight.strides[:-2], strict=True)
        if any(size != 1 and stride != 0 for size, stride in batch):
            return expr
        source = leaf if leaf in rewriter.params else self.origin[leaf]
        param = self.done.get((leaf, "matrix"))
        if param is None:
            matrix = weight[(0,) * (weight.ndim - 2)]
            param = rewriter.add_param(matrix, source.name, rewriter.layers[source])
            self.done[leaf, "matrix"] = param
        before = rewriter.emit(expr)
        after = rewriter.emit(relax.op.matmul(data, param, out_dtype=expr.attrs.out_dtype))
        return rewriter.lookup(after) if same_shape(before, after) else expr


def _key(expr: Any) -> Any:
    leaves = operands_of(expr)
    parts = [x if isinstance(x, relax.Var | tvm.ir.GenericConst) else str(x) for x in leaves]
    return (expr.op.name, str(expr.attrs), *parts)


def _known_shape(rewriter: MainRewriter, expr: Any) -> Any:
    """Make a constant of a shape that is known."""
    shape = expr.args[0]
    call = rewriter.lookup(shape)
    if call_of(call, "shape_of"):
        shape = getattr(call.args[0].ty, "shape", None)
    dims = _static_dims(shape)
    return expr if dims is None else relax.const(np.array(dims, "int64"), "int64")


def _stored_size(array: np.ndarray) -> int:
    """Count the elements that are stored: a broadcast axis counts once."""
    sizes = zip(array.shape, array.strides, strict=True)
    return int(np.prod([size for size, stride in sizes if stride != 0], dtype=np.int64))


def _grows(arrays: list[np.ndarray]) -> bool:
    """Say whether an elementwise result is large, and larger than all that it comes from."""
    size = np.prod(np.broadcast_shapes(*(array.shape for array in arrays)), dtype=np.int64)
    return bool(size > max(GROWTH_LIMIT, *(_stored_size(array) for array in arrays)))


def _static_dims(shape: Any) -> tuple[int, ...] | None:
    if not isinstance(shape, relax.ShapeExpr):
        return None
    if not all(isinstance(dim, tvm.tirx.IntImm) for dim in shape.values):
        return None
    return tuple(int(dim) for dim in shape.values)


def _permute(arrays: list[np.ndarray], call: Any) -> np.ndarray:
    axes = call.attrs.axes
    return arrays[0].transpose(None if axes is None else [int(axis) for axis in axes])


def _reshape(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    dims = _static_dims(call.args[1])
    if dims is None or _stored_size(arrays[0]) < arrays[0].size > GROWTH_LIMIT:
        return None
    return arrays[0].reshape(dims)


def _broadcast(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    dims = _static_dims(call.args[1])
    return None if dims is None else np.broadcast_to(arrays[0], dims)


def _expand_dims(arrays: list[np.ndarray], call: Any) -> np.ndarray:
    return np.expand_dims(arrays[0], tuple(int(axis) for axis in call.attrs.axis))


def _squeeze(arrays: list[np.ndarray], call: Any) -> np.ndarray:
    axis = call.attrs.axis
    return np.squeeze(arrays[0], None if axis is None else tuple(int(a) for a in axis))


def _flatten(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    return arrays[0].reshape(-1) if _stored_size(arrays[0]) == arrays[0].size else None


def _astype(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    quantised = str(arrays[0].dtype) in ("int8", "uint8") and arrays[0].ndim >= 2
    if quantised and is_float(call.attrs.dtype):
        return None
    try:
        return arrays[0].astype(np.dtype(str(call.attrs.dtype)), copy=False)
    except TypeError:
        return None


def _concat(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    axis = call.attrs.axis
    if sum(array.size for array in arrays) > GROWTH_LIMIT + sum(map(_stored_size, arrays)):
        return None
    return np.concatenate([a.reshape(-1) if axis is None else a for a in arrays], axis or 0)


def _take(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    data, indices = arrays
    axis = call.attrs.axis
    extent = data.size if axis is None else data.shape[int(axis)]
    if indices.size and (indices.min() < 0 or indices.max() >= extent):
        return None
    if indices.size * (data.size // max(extent, 1)) > max(GROWTH_LIMIT, data.size):
        return None
    return np.take(data, indices, axis=None if axis is None else int(axis))


def _strided_slice(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    numbers = [_ints(arg) for arg in call.args[1:]]
    if len(numbers) < 3 or any(item is None for item in numbers):
        return None
    axes, begin, end, *rest = numbers
    strides = rest[0] if rest else [1] * len(axes or [])
    window = [slice(None)] * arrays[0].ndim
    for axis, start, stop, step in zip(
        axes or [], begin or [], end or [], strides or [], strict=True
    ):
        if step <= 0:
            return None
        window[axis] = slice(start, stop, step)
    return arrays[0][tuple(window)]


def _ints(expr: Any) -> list[int] | None:
    fields = getattr(expr, "fields", None)
    if fields is None or not all(isinstance(field, tvm.tirx.IntImm) for field in fields):
        return None
    return [int(field) for field in fields]


def _matmul(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    left, right = arrays
    if not is_float(left.dtype) or left.dtype != right.dtype or min(left.ndim, right.ndim) < 2:
        return None
    work = left.size * right.shape[-1]
    return left @ right if work <= PRODUCT_LIMIT and right.ndim == 2 else None


def _full_like(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    """Fill the shape of a weight with one number: what is put where a mask hides it."""
    shape = arrays[0].shape
    return None if call.attrs.dtype else np.broadcast_to(arrays[1].astype(arrays[0].dtype), shape)


def _where(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
    return None if _grows(arrays) or len(arrays) != 3 else np.where(*arrays)


def _compare(function: Callable[..., np.ndarray]) -> Evaluator:
    def evaluate(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
        if _grows(arrays) or len(arrays) != len(call.args):
            return None
        return function(*arrays)

    return evaluate


def _elementwise(function: Callable[..., np.ndarray]) -> Evaluator:
    def evaluate(arrays: list[np.ndarray], call: Any) -> np.ndarray | None:
        if _grows(arrays) or len(arrays) != len(call.args):
            return None
        result = np.asarray(function(*arrays))
        return result if result.dtype == arrays[0].dtype else None

    return evaluate


_EVALUATORS: dict[str, Evaluator] = {
    "permute_dims": _permute,
    "reshape": _reshape,
    "broadcast_to": _broadcast,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "flatten": _flatten,
    "full_like": _full_like,
    "astype": _astype,
    "concat": _concat,
    "take": _take,
    "strided_slice": _strided_slice,
    "matmul": _matmul,
    "add": _elementwise(np.add),
    "subtract": _elementwise(np.subtract),
    "multiply": _elementwise(np.multiply),
    "divide": _elementwise(np.divide),
    "power": _elementwise(np.power),
    "maximum": _elementwise(np.maximum),
    "minimum": _elementwise(np.minimum),
    "negative": _elementwise(np.negative),
    "less": _compare(np.less),
    "less_equal": _compare(np.less_equal),
    "greater": _compare(np.greater),
    "greater_equal": _compare(np.greater_equal),
    "equal": _compare(np.equal),
    "not_equal": _compare(np.not_equal),
    "logical_not": _compare(np.logical_not),
    "logical_and": _compare(np.logical_and),
    "logical_or": _compare(np.logical_or),
    "where": _where,
    "abs": _elementwise(np.abs),
    "sqrt": _elementwise(np.sqrt),
    "rsqrt": _elementwise(lambda x: np.reciprocal(np.sqrt(x))),
    "exp": _elementwise(np.exp),
    "log": _elementwise(np.log),
    "square": _elementwise(np.square),
    "tanh": _elementwise(np.tanh),
}
