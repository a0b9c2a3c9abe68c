"""An epilogue's arithmetic on one float32 a thread: what the GPU's own math functions give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ..epilogue import EMITTERS
from .threads import local


def _gelu(x: Any) -> Any:
    return T.float32(0.5) * x * (T.float32(1) + T.erf(x * T.float32(math.sqrt(0.5))))


def _gelu_tanh(x: Any) -> Any:
    inner = T.float32(math.sqrt(2 / math.pi)) * (x + T.float32(0.044715) * x * x * x)
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


def _sigmoid(x: Any) -> Any:
    return T.float32(1) / (T.float32(1) + T.exp(-x))


# The operations whose vector form is a polynomial of the processor's; the others are arithmetic.
_FUNCTIONS = {
    "exp": T.exp,
    "erf": T.erf,
    "tanh": T.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


class ThreadArithmetic:
    """Epilogues on one number a thread."""

    def splat(self, scalar: Any) -> Any:
        """Take a scalar as it is."""
        return scalar

    def keep(self, value: Any) -> Any:
        """Compute a value once, and return a cheap read of it."""
        register = local(1)
        B.buffer_store(register, value, [0])
        return register[0]

    def apply(self, name: str, inputs: Sequence[Any]) -> Any:
        """Emit an operation of `EMITTERS`."""
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](inputs[0])
        return EMITTERS[name](inputs, 1)
