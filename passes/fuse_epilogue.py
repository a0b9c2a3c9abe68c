"""Decide which elementwise operations behind a weight's operator run inside its kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.sym import Analyzer

from ..model import Model
from ..ops.base import product, static
from ..workload import Epilogue, EpilogueOp, EpilogueRef

ACC = EpilogueRef("acc")


class Body:
    """The bindings of `main` in order, with who uses what."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.function = model.mod["main"]
        self.bindings: list[tuple[Any, Any]] = []
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self.bindings.append((binding.var, getattr(binding, "value", None)))
        self.position = {variable.name: i for i, (variable, _) in enumerate(self.bindings)}
        self.users: dict[str, list[int]] = {}
        for index, (_, expression) in enumerate(self.bindings):
            for name in _variables(expression):
                self.users.setdefault(name, []).append(index)
        for name in _variables(self.function.body.body):
            self.users.setdefault(name, []).append(len(self.bindings))


def _variables(expression: Any) -> set[str]:
    names: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            names.add(node.name)

    if expression is not None:
        relax.analysis.post_order_visit(expression, visit)
    return names


@dataclass(frozen=True)
class FusedEpilogue:
    """The bindings that one kernel computes.

    Attributes
    ----------
    members : frozenset of int
        Positions in `Body.bindings`, the operator's own among them.
    result : int
        Position of the binding whose value the kernel stores.
    channels, tensors : tuple
        The operands: per-channel weight parameters by name, and expressions of the result's shape.
    """

    members: frozenset[int]
    result: int
    epilogue: Epilogue
    channels: tuple[str, ...] = ()
    tensors: tuple[Any, ...] = ()

    @staticmethod
    def nothing(index: int) -> FusedEpilogue:
        """Only the operator itself."""
        return FusedEpilogue(frozenset([index]), index, Epilogue())


def _scalar(value: float) -> EpilogueRef:
    return EpilogueRef("scalar", value=float(value))


Lowered = list[tuple[str, list[EpilogueRef]]]


class Growth:
    """The operations that may join, in program order, and the operands that they brought.

    Parameters
    ----------
    body : Body
    like : relax.Var
        Has the shape and the type of the values.
    channel_axis : callable
        Gives the axis of the features for a number of dimensions.
    values : mapping of str to EpilogueRef
        What is inside already.
    """

    def __init__(
        self,
        body: Body,
        like: Any,
        channel_axis: Callable[[int], int],
        values: Mapping[str, EpilogueRef],
    ) -> None:
        self.body = body
        self.shape, self.dtype = _extents(like), str(like.ty.dtype)
        self.axis = channel_axis(len(self.shape))
        self.features = self.shape[self.axis]
        self.values = dict(values)
        self.ops: list[EpilogueOp] = []
        self.channels: list[str] = []
        self.tensors: list[Any] = []

    def try_join(self, index: int) -> bool:
        """Add the binding at `index` if it is elementwise on what is already inside."""
        call = self.body.bindings[index][1]
        return bool(self.values.keys() & _variables(call)) and self.join(index)

    def join(self, index: int) -> bool:
        """Add the binding at `index` if it is elementwise."""
        variable, call = self.body.bindings[index]
        if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
            return False
        if call.op.name == "relax.reshape":
            return self._join_reshape(variable, call)
        lower = LOWERINGS.get(call.op.name)
        if lower is None or not self._same_layout(variable):
            return False
        channels, tensors = len(self.channels), len(self.tensors)
        lowered = lower(self, call)
        if lowered is None:
            del self.channels[channels:], self.tensors[tensors:]
            return False
        for name, inputs in lowered:
            count = len(self.ops)
            resolved = [
                EpilogueRef("node", count + ref.index)
                if ref.kind == "node" and ref.index < 0
                else ref
                for ref in inputs
            ]
            self.ops.append(EpilogueOp(name, tuple(resolved)))
        self.values[variable.name] = EpilogueRef("node", len(self.ops) - 1)
        return True

    def _join_reshape(self, variable: Any, call: Any) -> bool:
        """Take in a reshape that keeps the features innermost: memory stays as it is."""
        if self.axis != len(self.shape) - 1 or not self._same_layout(variable):
            return False
        source = self.operand(call.args[0])
        if source is None:
            return False
        self.values[variable.name] = source
        return True

    def _same_layout(self, variable: Any) -> bool:
        """Whether a value has the result's elements in the result's order."""
        ty = variable.ty
        if not isinstance(ty, relax.TensorType) or str(ty.dtype) != self.dtype:
            return False
        if not isinstance(ty.shape, relax.ShapeExpr):
            return False
        shape = _extents(variable)
        if _equal_shapes(shape, self.shape):
            return True
        last = len(self.shape) - 1
        return (
            self.axis == last
            and len(shape) >= 1
            and _equal(shape[-1], self.features)
            and _equal(product(shape), product(self.shape))
        )

    def operand(self, expression: Any) -> EpilogueRef | None:
        """Name an operand: a value inside, a scalar, a per-channel weight, or a whole tensor."""
        if isinstance(expression, tvm.ir.GenericConst):
            value = expression.value.numpy()
            return _scalar(value.reshape(-1)[0]) if value.size == 1 else None
        if not isinstance(expression, relax.Var):
            return None
        if expression.name in self.values:
            return self.values[expression.name]
        weight = self.body.model.params.get(expression.name)
        if weight is not None:
            reference = self._weight_operand(expression.name, weight)
            if reference is not None:
                return reference
        return self._tensor_operand(expression) if self._same_layout(expression) else None

    def _weight_operand(self, name: str, weight: np.ndarray) -> EpilogueRef | None:
        if str(weight.dtype) != self.dtype:
            return None
        if weight.size == 1:
            return _scalar(weight.reshape(-1)[0])
        trailing = len(self.shape) - 1 - self.axis
        expected = (weight.size, *([1] * trailing))
        if not _equal(weight.size, self.features) or weight.shape[-len(expected) :] != expected:
            return None
        if name not in self.channels:
            self.channels.append(name)
        return EpilogueRef("channel", self.channels.index(name))

    def _tensor_operand(self, expression: Any) -> EpilogueRef:
        for index, known in enumerate(self.tensors):
            if known.same_as(expression):
                return EpilogueRef("tensor", index)
        self.tensors.append(expression)
        return EpilogueRef("tensor", len(self.tensors) - 1)

    def fused(self, members: frozenset[int], result: int, start: int = -1) -> FusedEpilogue:
        """Add the members, in order, and return the graph of all operations."""
        for index in sorted(members - {start}):
            if not self.join(index):
                raise AssertionError("a fused operation cannot be fused again")
        epilogue = Epilogue(tuple(self.ops), len(self.channels), len(self.tensors))
        return FusedEpilogue(members, result, epilogue, tuple(self.channels), tuple(self.tensors))


def grow_epilogue(
    body: Body,
    start: int,
    channel_axis: Callable[[int], int],
    taken: Collection[int] = (),
) -> FusedEpilogue:
    """Fuse as many elementwise operations behind binding `start` as leave one value to store.

    Operations join in program order as long as each works on values inside and on scalars,
    per-channel weights or tensors of the result's shape. Of the prefixes, the longest is taken
    whose inner values nobody outside needs. Bindings in `taken` belong to another kernel.
    """
    variable = body.bindings[start][0]
    growth = Growth(body, variable, channel_axis, {variable.name: ACC})
    joined = [start]
    for index in range(start + 1, len(body.bindings)):
        if index not in taken and growth.try_join(index):
            joined.append(index)
    for result in reversed(joined):
        members = _ancestors(body, result, joined)
        if start in members and _closed(body, members, result):
            # Grow again over the members only: nothing else leaves operations or operands behind.
            exact = Growth(body, variable, channel_axis, {variable.name: ACC})
            return exact.fused(members, result, start)
    return FusedEpilogue.nothing(start)


def _ancestors(body: Body, result: int, joined: list[int]) -> frozenset[int]:
    inside, members = set(joined), {result}
    for index in reversed([i for i in joined if i <= result]):
        if index in members:
            for name in _variables(body.bindings[index][1]):
                position = body.position.get(name)
                if position is not None and position in inside:
                    members.add(position)
    return frozenset(members)


def _closed(body: Body, members: frozenset[int], result: int) -> bool:
    return all(
        user in members
        for index in members
        if index != result
        for user in body.users.get(body.bindings[index][0].name, [])
    )


def _previous() -> EpilogueRef:
    """Refer to the operation just before, in the same lowering."""
    return EpilogueRef("node", -1)


def _elementwise(name: str) -> Callable[[Growth, Any], Lowered | None]:
    def lower(growth: Growth, call: Any) -> Lowered | None:
        operands = [growth.operand(argument) for argument in call.args]
        known = [operand for operand in operands if operand is not None]
        return [(name, known)] if len(known) == len(operands) else None

    return lower


def _relu(growth: Growth, call: Any) -> Lowered | None:
    operand = growth.operand(call.args[0])
    return None if operand is None else [("maximum", [operand, _scalar(0.0)])]


def _clip(growth: Growth, call: Any) -> Lowered | None:
    operand = growth.operand(call.args[0])
    bounds = [_number(argument) for argument in call.args[1:3]]
    if operand is None or bounds[0] is None or bounds[1] is None:
        return None
    return [
        ("maximum", [operand, _scalar(bounds[0])]),
        ("minimum", [_previous(), _scalar(bounds[1])]),
    ]


def _leaky_relu(growth: Growth, call: Any) -> Lowered | None:
    operand, alpha = growth.operand(call.args[0]), float(call.attrs.alpha)
    if operand is None or not 0 <= alpha <= 1:
        return None
    return [
        ("multiply", [operand, _scalar(alpha)]),
        ("maximum", [operand, _previous()]),
    ]


def _power(growth: Growth, call: Any) -> Lowered | None:
    base, exponent = growth.operand(call.args[0]), growth.operand(call.args[1])
    if base is None or exponent is None or exponent.kind != "scalar":
        return None
    if exponent.value == 2.0:
        return [("multiply", [base, base])]
    if exponent.value == 3.0:
        return [("multiply", [base, base]), ("multiply", [_previous(), base])]
    if exponent.value == 0.5:
        return [("sqrt", [base])]
    return None


def _square(growth: Growth, call: Any) -> Lowered | None:
    operand = growth.operand(call.args[0])
    return None if operand is None else [("multiply", [operand, operand])]


def _rsqrt(growth: Growth, call: Any) -> Lowered | None:
    operand = growth.operand(call.args[0])
    if operand is None:
        return None
    return [("sqrt", [operand]), ("divide", [_scalar(1.0), _previous()])]


def _number(expression: Any) -> float | None:
    if isinstance(expression, tvm.ir.GenericConst):
        value = expression.value.numpy()
        return float(value.reshape(-1)[0]) if value.size == 1 else None
    expression = getattr(expression, "value", expression)
    value = getattr(expression, "value", expression)
    return float(value) if isinstance(value, (int, float)) else None


LOWERINGS: dict[str, Callable[[Growth, Any], Lowered | None]] = {
    "relax.add": _elementwise("add"),
    "relax.subtract": _elementwise("subtract"),
    "relax.multiply": _elementwise("multiply"),
    "relax.divide": _elementwise("divide"),
    "relax.maximum": _elementwise("maximum"),
    "relax.minimum": _elementwise("minimum"),
    "relax.negative": _elementwise("negative"),
    "relax.abs": _elementwise("abs"),
    "relax.sqrt": _elementwise("sqrt"),
    "relax.exp": _elementwise("exp"),
    "relax.erf": _elementwise("erf"),
    "relax.tanh": _elementwise("tanh"),
    "relax.sigmoid": _elementwise("sigmoid"),
    "relax.nn.silu": _elementwise("silu"),
    "relax.nn.gelu": _elementwise("gelu"),
    "relax.nn.gelu_tanh": _elementwise("gelu_tanh"),
    "relax.nn.relu": _relu,
    "relax.nn.leakyrelu": _leaky_relu,
    "relax.clip": _clip,
    "relax.power": _power,
    "relax.square": _square,
    "relax.rsqrt": _rsqrt,
}


def _extents(variable: Any) -> list[Any]:
    """Return the dimensions of a tensor, integers where they are known."""
    sizes = [(static(extent), extent) for extent in variable.ty.shape]
    return [extent if size is None else size for size, extent in sizes]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(Analyzer().can_prove_equal(a, b))


def _equal_shapes(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
