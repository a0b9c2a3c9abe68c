"""The end of a GPU kernel: the epilogue's operands, and one result at a time through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as B

from ...workload import Epilogue
from ..epilogue import emit_epilogue
from .thread_math import ThreadArithmetic


class Results:
    """Declares an epilogue's vectors and tensors and y, and writes results."""

    def __init__(self, epilogue: Epilogue, channels: int, shape: Sequence[Any]) -> None:
        self.epilogue, self.channels, self.shape = epilogue, channels, tuple(shape)

    def declare(self) -> None:
        """Declare the arguments behind the weight's."""
        count = self.epilogue
        self.vectors = [
            B.arg(f"channel{i}", B.Buffer((self.channels,), "float32"))
            for i in range(count.channels)
        ]
        self.tensors = [
            B.arg(f"tensor{i}", B.Buffer(self.shape, "float32")) for i in range(count.tensors)
        ]
        self.y = B.arg("y", B.Buffer(self.shape, "float32"))

    def store(self, result: Any, channel: Any, index: Sequence[Any]) -> None:
        """Send one result through the epilogue to its place."""
        arithmetic = ThreadArithmetic()
        value = emit_epilogue(
            self.epilogue,
            arithmetic.keep(result),
            lambda i: self.vectors[i][channel],
            lambda i: self.tensors[i][tuple(index)],
            arithmetic,
        )
        B.buffer_store(self.y, value, list(index))
