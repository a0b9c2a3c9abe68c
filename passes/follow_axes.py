"""Write chains of reshapes, transpositions and selections with as few operators as they need.

Exporters move axes one step at a time: `torch.nn.MultiheadAttention` stacks queries, keys and
values on an axis of their own, brings it to the front, selects from it, and splits heads with the
batch in between. What each axis of the result is made of says the same in three operators, in which
attention can be seen: a slice of the last axis, one reshape that splits, one transposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tvm import relax

from ..model import Model
from .rewrite_main import MainRewriter, call_of, static_shape

_RESHAPES = ("reshape", "squeeze", "expand_dims")


def follow_axes(model: Model) -> Model:
    """Rewrite each chain from its source; numbers that multiply in between come last."""
    return MainRewriter(model).run(_rewrite)


def _rewrite(rewriter: MainRewriter, var: Any, expr: Any) -> Any:
    shape = static_shape(var)
    if shape is None or 0 in shape or not _is_step(expr):
        return None
    chain = _trace(rewriter, expr, shape)
    if chain is None:
        return None
    merges = _merges_heads(rewriter, chain)
    moves = _moves(chain, shape, merges)
    if moves is None or not (merges or _is_shorter(moves, chain.steps, len(shape))):
        return None
    result = chain.source
    for move in moves:
        result = rewriter.emit(move.apply(result), var.name)
    for number in reversed(chain.factors):
        result = rewriter.emit(relax.op.multiply(result, number), var.name)
    return result


@dataclass(frozen=True)
class _Move:
    """An operator, by its name and what it makes of a tensor."""

    name: str
    apply: Callable[[Any], Any]


def _is_shorter(moves: Sequence[_Move], steps: Sequence[Any], rank: int) -> bool:
    """Tell whether data is moved less often, or as often with fewer reshapes.

    Five axes are heads that are about to be repeated: that is looked for as it is written.
    """
    moving = ("permute_dims", "take")
    before = sum(call_of(step, name) for step in steps for name in moving)
    after = sum(move.name in moving for move in moves)
    fewer = len(moves) < len(steps) and rank < 5
    return after < before or (after == before and fewer)


@dataclass
class _Axes:
    """What the axes of a tensor are made of: parts of the source's axes, in order.

    Attributes
    ----------
    sizes : dict
        Of each part.
    source, axes : list of list of int
        The parts of every axis of the source, and of the tensor; those of size 1 are given places
        in it only by `place_ones`.
    chosen : dict
        Parts that were selected from -> the index.
    """

    sizes: dict[int, int]
    source: list[list[int]]
    axes: list[list[int]]
    chosen: dict[int, int]

    @classmethod
    def of(cls, shape: Sequence[int]) -> _Axes:
        """Start with one part an axis."""
        source = [[axis] for axis in range(len(shape))]
        axes = [[axis] if size > 1 else [] for axis, size in enumerate(shape)]
        return cls(dict(enumerate(shape)), source, axes, {})

    def reshape(self, shape: Sequence[int]) -> bool:
        """Deal the parts out to other axes; False where they would have to be cut across."""
        left = [part for parts in self.axes for part in parts]
        dealt: list[list[int]] = []
        for size in shape:
            parts: list[int] = []
            while size > 1:
                first = self.sizes[left[0]]
                if size % first:
                    if first % size:
                        return False
                    self._split(left, size)
                    first = size
                parts.append(left.pop(0))
                size //= first
            dealt.append(parts)
        self.axes = dealt
        return True

    def _split(self, left: list[int], size: int) -> None:
        """Cut the first part that is left in two, `size` before the rest."""
        part, rest = left[0], max(self.sizes) + 1
        self.sizes[rest] = self.sizes[part] // size
        self.sizes[part] = size
        left.insert(1, rest)
        # The axes are about to be dealt anew.
        for parts in self.source:
            if part in parts:
                parts.insert(parts.index(part) + 1, rest)

    def select(self, axis: int, index: int) -> bool:
        """Take one index of an axis that is one part."""
        if len(self.axes[axis]) != 1:
            return False
        [part] = self.axes.pop(axis)
        self.chosen[part] = index % self.sizes[part]
        return True

    def place_ones(self) -> None:
        """Give axes of size 1 to parts of size 1, in order; what is left over goes to the front."""
        ones = [part for parts in self.source for part in parts if self.sizes[part] == 1]
        for parts in self.axes:
            if not parts and ones:
                parts.append(ones.pop(0))
        self.axes[0][:0] = ones

    def coalesce(self) -> None:
        """Make one part of two that stay neighbours."""
        for parts in self.source:
            for first, second in pairwise(parts):
                holder = next((axis for axis in self.axes if first in axis), [])
                at = holder.index(first) + 1 if holder else 0
                if at and holder[at : at + 1] == [second]:
                    self.sizes[second] *= self.sizes.pop(first)
                    parts.remove(first)
                    holder.remove(first)
                    self.coalesce()
                    return


@dataclass
class _Chain:
    """Operators from a source to a result; `factors` are numbers that multiply it."""

    source: Any
    axes: _Axes
    steps: list[Any]
    factors: list[Any]


def _is_step(expr: Any) -> bool:
    return any(call_of(expr, name) for name in (*_RESHAPES, "permute_dims", "take"))


def _trace(rewriter: MainRewriter, expr: Any, shape: tuple[int, ...]) -> _Chain | None:
    """Go back over the operators, and forward again with the axes."""
    calls: list[tuple[Any, tuple[int, ...]]] = []
    factors: list[Any] = []
    while True:
        number = _factor(rewriter, expr, shape)
        if number is not None:
            factors.append(number)
        elif _is_step(expr):
            calls.append((expr, shape))
        else:
            break
        source = expr.args[0]
        before = static_shape(source)
        if before is None or not isinstance(source, relax.Var) or source in rewriter.params:
            return None
        expr, shape = rewriter.lookup(source), before
    axes = _Axes.of(shape)
    steps = [call for call, _ in reversed(calls)]
    for call, after in reversed(calls):
        if not _apply(rewriter, axes, call, after):
            return None
    if not axes.axes:
        return None
    axes.coalesce()
    axes.place_ones()
    return _Chain(source, axes, steps, factors)


def _factor(rewriter: MainRewriter, expr: Any, shape: tuple[int, ...]) -> Any:
    """Return the number that a multiplication has as its second operand, else None."""
    if not call_of(expr, "multiply") or static_shape(expr.args[0]) != shape:
        return None
    number = expr.args[1]
    return number if rewriter.scalar(number) is not None and number.ty.ndim == 0 else None


def _apply(rewriter: MainRewriter, axes: _Axes, call: Any, after: tuple[int, ...]) -> bool:
    if call_of(call, "permute_dims"):
        rank = len(after)
        given = call.attrs.axes
        order = range(rank)[::-1] if given is None else [int(axis) % rank for axis in given]
        axes.axes = [axes.axes[axis] for axis in order]
        return True
    if call_of(call, "take"):
        index = rewriter.scalar(call.args[1])
        scalar = call.args[1].ty.ndim == 0 and call.attrs.axis is not None
        if index is None or not scalar:
            return False
        return axes.select(int(call.attrs.axis) % len(axes.axes), int(index))
    return axes.reshape(after)


def _moves(chain: _Chain, shape: tuple[int, ...], merges: bool) -> list[_Move] | None:
    """List what leads from the source to the result.

    Where it `merges` heads, that comes before other axes are moved.
    """
    axes, sizes = chain.axes, chain.axes.sizes
    current = list(static_shape(chain.source) or ())
    moves: list[_Move] = []
    if axes.chosen:
        cut = _slice_of(axes, current)
        if cut is None:
            return None
        moves.append(cut)
    order = [part for parts in axes.source for part in parts if part not in axes.chosen]
    wanted = [part for parts in axes.axes for part in parts]
    if merges:
        held = axes.axes[-1]
        lead = [part for part in order if part not in held]
        moves += _turned(current, order, [*lead, *held], sizes)
        current = [*(sizes[part] for part in lead), math.prod(sizes[part] for part in held)]
        moves.append(_reshape_to(current))
        # The last axis is one part from here on.
        sizes = {**sizes, held[0]: current[-1]}
        order, wanted = [*lead, held[0]], [*wanted[: len(lead)], held[0]]
    moves += _turned(current, order, wanted, sizes)
    return moves if current == list(shape) else [*moves, _reshape_to(shape)]


def _turned(
    current: list[int], order: list[int], wanted: list[int], sizes: dict[int, int]
) -> list[_Move]:
    """Bring the parts of a tensor of shape `current`, which follows, into another order."""
    if order == wanted:
        return []
    split = [sizes[part] for part in order]
    moves = [] if current == split else [_reshape_to(split)]
    current[:] = [sizes[part] for part in wanted]
    places = [order.index(part) for part in wanted]
    return [*moves, _Move("permute_dims", lambda x: relax.op.permute_dims(x, places))]


def _slice_of(axes: _Axes, shape: list[int]) -> _Move | None:
    """Return the slice that selects from the last axis of the source; `shape` becomes its own."""
    last = axes.source[-1]
    if set(axes.chosen) != {*last[:1]} or len(last) < 2:
        return None
    size = shape[-1] // axes.sizes[last[0]]
    begin, axis = axes.chosen[last[0]] * size, len(shape) - 1
    shape[-1] = size
    end = begin + size
    return _Move("slice", lambda x: relax.op.strided_slice(x, [axis], [begin], [end]))


def _reshape_to(shape: Sequence[int]) -> _Move:
    wanted = list(shape)
    return _Move("reshape", lambda x: relax.op.reshape(x, wanted))


def _merges_heads(rewriter: MainRewriter, chain: _Chain) -> bool:
    """Tell whether the heads of a product of two activations are merged into the last axis.

    That comes first then: the move of other axes can go on behind the projection, where it often
    meets its inverse.
    """
    axes, call = chain.axes, rewriter.lookup(chain.source)
    if len(axes.axes[-1]) < 2 or axes.chosen or not call_of(call, "matmul"):
        return False
    return not any(arg in rewriter.params for arg in call.args)
