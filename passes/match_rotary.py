"""Find rotary embeddings written out: x * cos + rotate_half(x) * sin over the last axis."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from .fuse_epilogue import Body
from .rewrite_main import call_of, first_of_slice, static_shape


@dataclass(frozen=True)
class Rotary:
    """What a rotary embedding reads.

    Attributes
    ----------
    members : frozenset of int
        The positions of all its bindings.
    data : relax.Var
        What is rotated.
    cos, sin : str
        The weights with the angles.
    """

    members: frozenset[int]
    data: Any
    cos: str
    sin: str


def match_rotary(body: Body, index: int) -> Rotary | None:
    """Recognise the embedding whose sum is the binding at `index`."""
    call = body.bindings[index][1]
    if not call_of(call, "add"):
        return None
    for straight, turned in itertools.permutations(call.args):
        for (x, cos), (half, sin) in itertools.product(
            _products(body, straight), _products(body, turned)
        ):
            members = _rotated_half(body, half, x)
            if members is not None:
                products = {body.position[straight.name], body.position[turned.name]}
                return Rotary(members | products | {index}, x, cos, sin)
    return None


def _call(body: Body, leaf: Any) -> Any:
    index = body.position.get(leaf.name) if isinstance(leaf, relax.Var) else None
    return None if index is None else body.bindings[index][1]


def _products(body: Body, leaf: Any) -> list[tuple[Any, str]]:
    """Read a product of a value and a weight, either way."""
    call = _call(body, leaf)
    if not call_of(call, "multiply"):
        return []
    found = []
    for value, weight in itertools.permutations(call.args):
        array = body.model.params.get(getattr(weight, "name", ""))
        if array is not None and array.dtype == np.float32 and isinstance(value, relax.Var):
            found.append((value, weight.name))
    return found


def _rotated_half(body: Body, leaf: Any, x: Any) -> frozenset[int] | None:
    """Match [-b, a] where `x` is [a, b]; return the bindings."""
    shape, both = static_shape(x), _call(body, leaf)
    if shape is None or not call_of(both, "concat") or len(both.args[0].fields) != 2:
        return None
    if int(both.attrs.axis or 0) % len(shape) != len(shape) - 1 or shape[-1] % 2:
        return None
    negated, first = both.args[0].fields
    minus = _call(body, negated)
    if not call_of(minus, "negative"):
        return None
    second, half = minus.args[0], shape[-1] // 2
    for piece, begin in ((first, 0), (second, half)):
        call = _call(body, piece)
        if static_shape(piece) != (*shape[:-1], half) or first_of_slice(piece, call) != begin:
            return None
        if not call.args[0].same_as(x):
            return None
    return frozenset(body.position[variable.name] for variable in (leaf, negated, first, second))
