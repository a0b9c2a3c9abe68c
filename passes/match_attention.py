"""Find attention written out: two products with a softmax between them, and heads split and merged.

Frameworks write it in many ways: scores divided by a number, or the queries or both factors
multiplied; one transposition of the keys or two; heads split before or behind the scaling. What is
followed here is where each axis of a product's operand comes from, through any number of
transpositions, reshapes and factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from ..schedules.x86.panels_attention import AttentionGeometry
from .fuse_epilogue import Body
from .match_rotary import Rotary, match_rotary
from .rewrite_main import call_of, constant_of, number_in, static_shape

# The axes of a [batch, tokens, heads * depth] tensor seen as four.
_BATCH, _TOKENS, _HEADS, _DEPTH = range(4)


@dataclass(frozen=True)
class Angles:
    """Names of the weights with the cosines and sines of a rotary embedding, [tokens, depth]."""

    cos: str
    sin: str


@dataclass(frozen=True)
class Attention:
    """softmax(scale * Q K^T + mask) V, found in `main`.

    Attributes
    ----------
    members : frozenset of int
        The positions of all its bindings.
    result : int
        The position of the one that gives [batch, tokens, heads * depth].
    query, key, value : relax.Var
        Each [batch, tokens, heads * depth].
    query_angles, key_angles : Angles or None
        Of the rotary embedding in front of the product.
    mask : relax.Expr or None
        Added to the scores: [batch or 1, heads or 1, queries or 1, keys].
    geometry : AttentionGeometry
        What is computed, but for the mask.
    """

    members: frozenset[int]
    result: int
    query: Any
    key: Any
    value: Any
    mask: Any
    geometry: AttentionGeometry
    query_angles: Angles | None = None
    key_angles: Angles | None = None


@dataclass
class _View:
    """An operand traced to where its heads were split; `times` is how often each is repeated."""

    source: Any
    axes: tuple[int, ...]
    sizes: tuple[int, int, int, int]
    factor: float
    times: int
    angles: Angles | None


class _Mismatch(Exception):
    """The operators are no attention that is known here."""


def match_attention(body: Body) -> Iterator[Attention]:
    """Find every attention whose inner values nobody else reads."""
    for index, (_, expression) in enumerate(body.bindings):
        if call_of(expression, "nn.softmax"):
            try:
                yield _Matcher(body).match(index)
            except _Mismatch:
                continue


class _Matcher:
    def __init__(self, body: Body) -> None:
        self.body = body
        self.members: set[int] = set()

    def match(self, softmax: int) -> Attention:
        """Follow a softmax back to queries and keys, and on to values and the result."""
        shape = self._shape(self.body.bindings[softmax][0])
        axis = int(self.body.bindings[softmax][1].attrs.axis) % len(shape)
        if len(shape) != 4 or axis != 3 or shape[2] != shape[3]:
            raise _Mismatch
        self.members.add(softmax)
        scores, mask, factor = self._scores(self.body.bindings[softmax][1].args[0], shape)
        query, key = self._view(scores.args[0]), self._view(scores.args[1])
        product, context = self._only_user(self.body.bindings[softmax][0])
        if not call_of(context, "matmul") or not self._is(context.args[0], softmax):
            raise _Mismatch
        value = self._view(context.args[1])
        result = self._merged(product)
        straight, turned = (_BATCH, _HEADS, _TOKENS, _DEPTH), (_BATCH, _HEADS, _DEPTH, _TOKENS)
        if (query.axes, key.axes, value.axes) != (straight, turned, straight):
            raise _Mismatch
        batch, tokens, heads, depth = query.sizes
        if key.sizes != (batch, tokens, heads // key.times, depth) or heads % key.times:
            raise _Mismatch
        if (value.sizes, value.times) != (key.sizes, key.times):
            raise _Mismatch
        if value.factor != 1.0 or query.times != 1 or value.angles is not None:
            raise _Mismatch
        if tuple(shape[:3]) != (batch, heads, tokens):
            raise _Mismatch
        scale = factor * query.factor * key.factor
        self._check_closed(result)
        return Attention(
            frozenset(self.members),
            result,
            query.source,
            key.source,
            value.source,
            mask,
            AttentionGeometry(batch, tokens, heads, heads // key.times, depth, scale),
            query.angles,
            key.angles,
        )

    def _shape(self, expression: Any) -> tuple[int, ...]:
        shape = static_shape(expression)
        if shape is None or str(expression.ty.dtype) != "float32":
            raise _Mismatch
        return shape

    def _is(self, expression: Any, index: int) -> bool:
        return (
            isinstance(expression, relax.Var) and self.body.position.get(expression.name) == index
        )

    def _call(self, expression: Any) -> tuple[int, Any]:
        """Return the binding of a variable."""
        if not isinstance(expression, relax.Var):
            raise _Mismatch
        index = self.body.position.get(expression.name)
        if index is None or not isinstance(self.body.bindings[index][1], relax.Call):
            raise _Mismatch
        return index, self.body.bindings[index][1]

    def _number(self, expression: Any) -> float | None:
        """Return the one float32 number that a constant or a weight holds, else None."""
        value = constant_of(expression, self.body.model.params)
        return number_in(value) if value is not None and value.dtype == np.float32 else None

    def _scaled(self, call: Any) -> tuple[Any, float] | None:
        """Read a multiplication by, or a division through, one number."""
        if call_of(call, "multiply"):
            for operand, other in ((0, 1), (1, 0)):
                number = self._number(call.args[other])
                if number is not None:
                    return call.args[operand], number
        if call_of(call, "divide"):
            number = self._number(call.args[1])
            if number:
                return call.args[0], 1.0 / number
        return None

    def _scores(self, expression: Any, shape: Sequence[int]) -> tuple[Any, Any, float]:
        """Go back from the softmax to the product: what was added, and the factor."""
        mask, factor = None, 1.0
        while True:
            index, call = self._call(expression)
            self.members.add(index)
            if call_of(call, "matmul"):
                return call, mask, factor
            scaled = self._scaled(call)
            if scaled is not None:
                expression, factor = scaled[0], factor * scaled[1]
            elif call_of(call, "add") and mask is None and factor == 1.0:
                # A factor behind the sum would be one of the mask as well.
                expression, mask = self._mask_of(call, shape)
            else:
                raise _Mismatch

    def _mask_of(self, call: Any, shape: Sequence[int]) -> tuple[Any, Any]:
        """Tell the scores from the mask: it alone is broadcast, or comes from elsewhere."""
        for scores, mask in ((call.args[0], call.args[1]), (call.args[1], call.args[0])):
            lead = (1,) * (4 - len(self._shape(mask))) + self._shape(mask)
            fits = all(a in (1, b) for a, b in zip(lead, shape, strict=True))
            if self._shape(scores) == tuple(shape) and fits and lead[3] == shape[3]:
                index = self.body.position.get(getattr(scores, "name", ""))
                inner = None if index is None else self.body.bindings[index][1]
                if inner is not None and (call_of(inner, "matmul") or self._scaled(inner)):
                    return scores, mask
        raise _Mismatch

    def _view(self, expression: Any) -> _View:
        """Follow an operand of a product back to [batch, tokens, heads * depth]."""
        axes, factor = tuple(range(4)), 1.0
        times, repeated = 1, _HEADS
        rotary: tuple[Rotary, tuple[int, ...]] | None = None
        if len(self._shape(expression)) != 4:
            raise _Mismatch
        while True:
            index, call = self._call(expression)
            self.members.add(index)
            scaled = self._scaled(call)
            rotated = None if rotary else match_rotary(self.body, index)
            if rotated is not None:
                self.members |= rotated.members
                expression, rotary = rotated.data, (rotated, axes)
            elif call_of(call, "permute_dims"):
                given = call.attrs.axes
                order = [int(a) % 4 for a in given] if given is not None else [3, 2, 1, 0]
                axes = tuple(order[axis] for axis in axes)
                repeated = order[repeated] if times > 1 else _HEADS
                expression = call.args[0]
            elif scaled is not None:
                expression, factor = scaled[0], factor * scaled[1]
            elif call_of(call, "reshape") and times == 1 and self._repeated(call):
                expression, times = self._repeated(call) or (None, 1)
                repeated = 1
            elif call_of(call, "reshape") and repeated == _HEADS:
                view = self._split(call, axes, factor, times)
                return replace(view, angles=self._angles(rotary, view)) if rotary else view
            else:
                raise _Mismatch
            if len(self._shape(expression)) != 4:
                raise _Mismatch

    def _repeated(self, call: Any) -> tuple[Any, int] | None:
        """Read [batch, heads, 1, ...] broadcast to [batch, heads, times, ...] and seen as four.

        Returns what was broadcast, as four axes, and how often.
        """
        inner = self._inner(call, "broadcast_to")
        alone = None if inner is None else self._inner(inner[1], "reshape", "expand_dims")
        if inner is None or alone is None:
            return None
        wide, narrow = self._shape(inner[1]), self._shape(alone[1])
        before = self._shape(alone[1].args[0])
        times = wide[2] if len(wide) == 5 else 0
        if narrow != (*before[:2], 1, *before[2:]) or wide != (*before[:2], times, *before[2:]):
            return None
        if self._shape(call) != (before[0], before[1] * times, *before[2:]):
            return None
        self.members |= {inner[0], alone[0]}
        return alone[1].args[0], times

    def _inner(self, call: Any, *names: str) -> tuple[int, Any] | None:
        """Return the binding of a call's first operand when it calls one of these operators."""
        try:
            index, inner = self._call(call.args[0])
        except _Mismatch:
            return None
        return (index, inner) if any(call_of(inner, name) for name in names) else None

    def _split(self, call: Any, axes: tuple[int, ...], factor: float, times: int) -> _View:
        source, split = self._shape(call.args[0]), self._shape(call)
        if len(split) != 4 or len(source) < 2 or not isinstance(call.args[0], relax.Var):
            raise _Mismatch
        if split[2] * split[3] != source[-1] or math.prod(source[:-1]) != split[0] * split[1]:
            raise _Mismatch
        return _View(
            call.args[0], axes, (split[0], split[1], split[2], split[3]), factor, times, None
        )

    def _angles(self, rotary: tuple[Rotary, tuple[int, ...]], view: _View) -> Angles:
        """Check that a rotary embedding turns the features of each head by the token's angles.

        It comes with where the operand's axes were there.
        """
        found, axes = rotary
        # The axis of the split heads that each axis of the rotated value is.
        inner = dict(zip(axes, view.axes, strict=True))
        wanted = tuple(
            view.sizes[inner[a]] if inner[a] in (_TOKENS, _DEPTH) else 1 for a in range(4)
        )
        for name in (found.cos, found.sin):
            shape = self.body.model.params[name].shape
            if inner[3] != _DEPTH or (1,) * (4 - len(shape)) + shape != wanted:
                raise _Mismatch
        return Angles(found.cos, found.sin)

    def _only_user(self, variable: Any) -> tuple[int, Any]:
        users = self.body.users.get(variable.name, [])
        if len(users) != 1 or users[0] >= len(self.body.bindings):
            raise _Mismatch
        index = users[0]
        if not isinstance(self.body.bindings[index][1], relax.Call):
            raise _Mismatch
        self.members.add(index)
        return index, self.body.bindings[index][1]

    def _merged(self, product: int) -> int:
        """Go on from the product with the values to the binding that merges the heads."""
        turn, call = self._only_user(self.body.bindings[product][0])
        if not call_of(call, "permute_dims") or call.attrs.axes is None:
            raise _Mismatch
        if [int(a) % 4 for a in call.attrs.axes] != [0, 2, 1, 3]:
            raise _Mismatch
        turned = self._shape(self.body.bindings[turn][0])
        merge, call = self._only_user(self.body.bindings[turn][0])
        merged = self._shape(self.body.bindings[merge][0])
        if not call_of(call, "reshape") or merged[-1] != turned[2] * turned[3]:
            raise _Mismatch
        return merge

    def _check_closed(self, result: int) -> None:
        """Refuse when something outside reads a value inside."""
        for index in self.members - {result}:
            for user in self.body.users.get(self.body.bindings[index][0].name, []):
                if user not in self.members:
                    raise _Mismatch
