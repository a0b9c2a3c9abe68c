"""The end of a GPU kernel: the epilogue's operands, and results through it to their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script import builder as B

from ...workload import Epilogue
from ..epilogue import emit_epilogue
from .thread_math import ThreadArithmetic
from .threads import local


class Results:
    """Declares an epilogue's vectors and tensors and y, and writes results.

    The epilogue is computed in float32, whatever the type of its operands and of y is.
    """

    def __init__(
        self, epilogue: Epilogue, channels: int, shape: Sequence[Any], dtype: str = "float32"
    ) -> None:
        self.epilogue, self.channels, self.shape = epilogue, channels, tuple(shape)
        self.dtype = dtype

    def declare(self) -> None:
        """Declare the arguments behind the weight's."""
        count = self.epilogue
        self.vectors = [
            B.arg(f"channel{i}", B.Buffer((self.channels,), self.dtype))
            for i in range(count.channels)
        ]
        self.tensors = [
            B.arg(f"tensor{i}", B.Buffer(self.shape, self.dtype)) for i in range(count.tensors)
        ]
        self.y = B.arg("y", B.Buffer(self.shape, self.dtype))

    def _wide(self, value: Any) -> Any:
        return value if self.dtype == "float32" else T.Cast("float32", value)

    def _narrow(self, value: Any) -> Any:
        return value if self.dtype == "float32" else T.Cast(self.dtype, value)

    def _finished(self, result: Any, channel: Any, tensors: Sequence[Any]) -> Any:
        arithmetic = ThreadArithmetic()
        value = emit_epilogue(
            self.epilogue,
            arithmetic.keep(result),
            lambda i: self._wide(self.vectors[i][channel]),
            lambda i: self._wide(tensors[i]),
            arithmetic,
        )
        return self._narrow(value)

    def store(self, result: Any, channel: Any, index: Sequence[Any]) -> None:
        """Send one result through the epilogue to its place."""
        tensors = [tensor[tuple(index)] for tensor in self.tensors]
        B.buffer_store(self.y, self._finished(result, channel, tensors), list(index))

    def store_pair(
        self, results: Sequence[Any], channels: Sequence[Any], index: Sequence[Any]
    ) -> None:
        """Send two results, which are neighbours in memory, through the epilogue.

        `index` is that of the first; the last axis has to begin at an even number.
        """
        pair = [*index[:-1], B.ramp(index[-1], 1, 2)]
        both = B.ramp(0, 1, 2)
        read = []
        for tensor in self.tensors:
            register = local(2, self.dtype)
            B.buffer_store(register, tensor[tuple(pair)], [both])
            read.append(register)
        finished = local(2, self.dtype)
        for i, (result, channel) in enumerate(zip(results, channels, strict=True)):
            value = self._finished(result, channel, [register[i] for register in read])
            B.buffer_store(finished, value, [i])
        B.buffer_store(self.y, finished[both], pair)
