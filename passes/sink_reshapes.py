"""Move what rearranges rows behind the matmul and what follows it.

PyTorch writes a linear layer on (B, S, K) as reshape to (B*S, K), matmul, add, reshape to
(B, S, M); in between, a residual add or an activation cannot be seen together with its matmul. Its
attention brings the sequence in front of the batch before, and back behind. The product does not
care: the reshape, or the exchange of batch and sequence, goes down until it meets its inverse.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, first_of_slice, shape_of

_UNARY = (
    "nn.relu",
    "nn.gelu",
    "nn.gelu_tanh",
    "nn.silu",
    "nn.leakyrelu",
    "nn.relu6",
    "sigmoid",
    "tanh",
    "erf",
    "exp",
    "negative",
    "clip",
)
_BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")


def sink_reshapes(model: Model) -> Model:
    """Rewrite ``f(move(x))`` to ``move(f(x))`` where `f` keeps the rows apart."""
    return MainRewriter(model).run(_sink)


def _sink(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op) or not expr.args:
        return None
    dims = shape_of(var)
    if dims is None:
        return None
    source = _before_reshape(rewriter, expr.args[0])
    if source is not None and call_of(expr, "reshape"):
        merged = relax.op.reshape(source, expr.args[1])
        return source if _same_dims(shape_of(source), shape_of(var)) else merged
    if source is not None and _keeps_rows(rewriter, expr):
        return relax.op.reshape(_moved(rewriter, var, expr, source), list(dims))
    turned = _before_turn(rewriter, expr.args[0])
    if turned is not None and (
        _keeps_rows(rewriter, expr) or first_of_slice(var, expr) is not None
    ):
        source, axes = turned
        return relax.op.permute_dims(_moved(rewriter, var, expr, source), axes)
    return None


def _moved(rewriter: MainRewriter, var: Any, expr: Any, source: Any) -> Any:
    """Emit `expr` on `source`, and what is found there behind it again."""
    moved = relax.Call(expr.op, [source, *expr.args[1:]], expr.attrs, expr.ty_args)
    emitted = rewriter.emit(moved, var.name)
    sunk = _sink(rewriter, emitted, moved)
    return emitted if sunk is None else rewriter.emit(sunk, var.name)


def _before_reshape(rewriter: MainRewriter, leaf: Any) -> Any:
    """Return what `leaf` was before a reshape that keeps the last dimension of a matmul chain."""
    call = rewriter.lookup(leaf)
    if not call_of(call, "reshape"):
        return None
    before, after = shape_of(call.args[0]), shape_of(leaf)
    if not before or not after or len(before) < 2 or len(after) < 2:
        return None
    return call.args[0] if _same_dims(before[-1:], after[-1:]) else None


def _before_turn(rewriter: MainRewriter, leaf: Any) -> tuple[Any, list[int]] | None:
    """Return what `leaf` was before its first two of three dimensions were exchanged, and the axes.

    Those are a batch and a sequence; four are heads, which attention wants where they are.
    """
    call = rewriter.lookup(leaf)
    if not call_of(call, "permute_dims") or call.attrs.axes is None:
        return None
    rank = len(call.attrs.axes)
    axes = [int(axis) % rank for axis in call.attrs.axes]
    return (call.args[0], axes) if axes == [1, 0, 2] else None


def _keeps_rows(rewriter: MainRewriter, expr: Any) -> bool:
    if call_of(expr, "matmul"):
        return expr.args[1] in rewriter.params and expr.args[1].ty.ndim == 2
    if any(call_of(expr, name) for name in _UNARY):
        return True
    if not any(call_of(expr, name) for name in _BINARY):
        return False
    other = expr.args[1]
    if isinstance(other, tvm.ir.GenericConst):
        return isinstance(other.ty, relax.TensorType) and other.ty.ndim == 0
    return other in rewriter.params and other.ty.ndim == 1


def _same_dims(left: Any, right: Any) -> bool:
    if left is None or right is None or len(left) != len(right):
        return False
    analyzer = tvm.sym.Analyzer()
    return all(bool(analyzer.can_prove_equal(a, b)) for a, b in zip(left, right, strict=True))
