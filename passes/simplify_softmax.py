"""Drop PyTorch's guard against rows of minus infinity where no mask can have made one.

``scaled_dot_product_attention`` decomposes into a softmax and a `where` that returns zeros for rows
which are masked entirely; the guard costs six passes over the attention scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..model import Model
from .rewrite_main import MainRewriter, call_of

_UNARY = ("logical_not", "astype", "max", "any", "reshape")
_FINITE = ("reshape", "permute_dims", "expand_dims", "squeeze", "broadcast_to")


def simplify_softmax(model: Model) -> Model:
    """Replace ``where(all(x == -inf), 0, softmax(x))`` by the softmax if `x` has no mask.

    A product of finite activations is finite unless it overflows; with a mask the guard stays.
    """
    return MainRewriter(model).run(_simplify)


def _simplify(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    if not call_of(expr, "where"):
        return None
    condition, zeros, result = expr.args
    softmax = rewriter.lookup(result)
    if not call_of(softmax, "nn.softmax") or not _is_zeros(rewriter, zeros):
        return None
    scores = softmax.args[0]
    guarded = _compared_with_minus_infinity(rewriter, condition)
    if guarded is None or not guarded.same_as(scores) or not _is_product(rewriter, scores):
        return None
    return result


def _is_zeros(rewriter: MainRewriter, leaf: Any) -> bool:
    call = rewriter.lookup(leaf)
    if call_of(call, "full_like"):
        leaf = call.args[1]
    elif call_of(call, "full"):
        leaf = call.args[1]
    elif call_of(call, "zeros") or call_of(call, "zeros_like"):
        return True
    return rewriter.scalar(leaf) == 0.0


def _compared_with_minus_infinity(rewriter: MainRewriter, leaf: Any) -> Any:
    call = rewriter.lookup(leaf)
    while any(call_of(call, name) for name in _UNARY):
        call = rewriter.lookup(call.args[0])
    if call_of(call, "equal") and rewriter.scalar(call.args[1]) == -np.inf:
        return call.args[0]
    return None


def _is_product(rewriter: MainRewriter, leaf: Any) -> bool:
    call = rewriter.lookup(leaf)
    while not call_of(call, "matmul"):
        scaled = call_of(call, "multiply") or call_of(call, "divide")
        if scaled and np.isfinite(rewriter.scalar(call.args[1]) or np.nan):
            call = rewriter.lookup(call.args[0])
        elif any(call_of(call, name) for name in _FINITE):
            call = rewriter.lookup(call.args[0])
        else:
            return False
    return True
