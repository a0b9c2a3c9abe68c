"""What is fused behind an operator, as vector expressions: one table from names to expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm.script import tirx as T

from ..workload import Epilogue, EpilogueRef
from .vectors import Vectors
from .x86 import vector_math

Emitter = Callable[[Sequence[Any], int], Any]


def _maximum(inputs: Sequence[Any], lanes: int) -> Any:
    return T.Select(_not_greater(inputs[0], inputs[1]), inputs[1], inputs[0])


def _minimum(inputs: Sequence[Any], lanes: int) -> Any:
    return T.Select(_not_greater(inputs[1], inputs[0]), inputs[1], inputs[0])


def _not_greater(a: Any, b: Any) -> Any:
    """Compare so that NaN in `a` gives false, and a NaN result of the operator is kept."""
    return a < b


# Name -> expression. Every operand is a vector of `lanes` float32 held in a register.
EMITTERS: dict[str, Emitter] = {
    "add": lambda v, lanes: v[0] + v[1],
    "subtract": lambda v, lanes: v[0] - v[1],
    "multiply": lambda v, lanes: v[0] * v[1],
    "divide": lambda v, lanes: v[0] / v[1],
    "maximum": _maximum,
    "minimum": _minimum,
    "negative": lambda v, lanes: -v[0],
    "abs": lambda v, lanes: T.fabs(v[0]),
    "sqrt": lambda v, lanes: T.sqrt(v[0]),
    "exp": lambda v, lanes: vector_math.exp(v[0], lanes),
    "erf": lambda v, lanes: vector_math.erf(v[0], lanes),
    "tanh": lambda v, lanes: vector_math.tanh(v[0], lanes),
    "sigmoid": lambda v, lanes: vector_math.sigmoid(v[0], lanes),
    "silu": lambda v, lanes: vector_math.silu(v[0], lanes),
    "gelu": lambda v, lanes: vector_math.gelu(v[0], lanes),
    "gelu_tanh": lambda v, lanes: vector_math.gelu_tanh(v[0], lanes),
}

# Long polynomials: kernels emit these in a loop, not once per accumulator.
LONG: frozenset[str] = frozenset(
    {"exp", "erf", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "sqrt", "divide"}
)


def is_long(epilogue: Epilogue) -> bool:
    """Whether unrolling the epilogue over every accumulator would bloat the kernel."""
    return len(epilogue.ops) > 4 or any(op.name in LONG for op in epilogue.ops)


class Arithmetic(Protocol):
    """How an epilogue computes: on vectors, or on one number a thread."""

    def splat(self, scalar: Any) -> Any:
        """Make an operand of a float32 scalar."""
        ...

    def keep(self, value: Any) -> Any:
        """Compute a value once, and return a cheap read of it."""
        ...

    def apply(self, name: str, inputs: Sequence[Any]) -> Any:
        """Emit an operation of `EMITTERS`."""
        ...


class VectorArithmetic(Vectors):
    """Epilogues on vectors of a processor."""

    def apply(self, name: str, inputs: Sequence[Any]) -> Any:
        """Emit an operation of `EMITTERS`."""
        return EMITTERS[name](inputs, self.lanes)


def emit_epilogue(
    epilogue: Epilogue,
    acc: Any,
    load_channel: Callable[[int], Any],
    load_tensor: Callable[[int], Any],
    arithmetic: int | Arithmetic,
) -> Any:
    """Emit the epilogue's operations on one operand and return the expression to store.

    Parameters
    ----------
    epilogue : Epilogue
        The fused operations.
    acc : PrimExpr
        The operator's result in float32; a buffer load, since it may be used several times.
    load_channel, load_tensor : callable
        Give the operand of the i-th per-channel vector, and of the i-th tensor.
    arithmetic : Arithmetic or int
        How to compute; a number stands for vectors of so many elements.
    """
    if isinstance(arithmetic, int):
        arithmetic = VectorArithmetic(arithmetic)
    nodes: list[Any] = []

    def value(ref: EpilogueRef) -> Any:
        if ref.kind == "acc":
            return acc
        if ref.kind == "node":
            return nodes[ref.index]
        if ref.kind == "scalar":
            return arithmetic.splat(T.float32(ref.value))
        if ref.kind == "channel":
            return load_channel(ref.index)
        return load_tensor(ref.index)

    last = len(epilogue.ops) - 1
    for position, op in enumerate(epilogue.ops):
        result = arithmetic.apply(op.name, [value(ref) for ref in op.inputs])
        nodes.append(result if position == last else arithmetic.keep(result))
    return nodes[-1] if nodes else acc
