"""What is fused behind an operator, as vector expressions: one table from names to expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def emit_epilogue(
    epilogue: Epilogue,
    acc: Any,
    load_channel: Callable[[int], Any],
    load_tensor: Callable[[int], Any],
    lanes: int,
) -> Any:
    """Emit the epilogue's operations on one vector and return the expression to store.

    Parameters
    ----------
    epilogue : Epilogue
        The fused operations.
    acc : PrimExpr
        The operator's result, `lanes` float32 values; a buffer load, since it may be used several
        times.
    load_channel, load_tensor : callable
        Give the vector of the i-th per-channel operand, and of the i-th tensor operand.
    lanes : int
        Vector width in elements.
    """
    vectors = Vectors(lanes)
    nodes: list[Any] = []

    def value(ref: EpilogueRef) -> Any:
        if ref.kind == "acc":
            return acc
        if ref.kind == "node":
            return nodes[ref.index]
        if ref.kind == "scalar":
            return vectors.splat(T.float32(ref.value))
        if ref.kind == "channel":
            return load_channel(ref.index)
        return load_tensor(ref.index)

    last = len(epilogue.ops) - 1
    for position, op in enumerate(epilogue.ops):
        result = EMITTERS[op.name]([value(ref) for ref in op.inputs], lanes)
        nodes.append(result if position == last else vectors.keep(result))
    return nodes[-1] if nodes else acc
