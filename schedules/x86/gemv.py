"""A matmul for a handful of tokens: vectors of output features, the weight read once."""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ...targets import X86Machine
from ...workload import MatmulGeometry, Workload
from ..base import Config
from ..vectors import Vectors
from .dense_kernel import thread_loop
from .matmul_io import argument, flat, store_features
from .streamed_weights import StreamedWeight

# Tokens by vector registers: each has an accumulator for every vector of the weight.
MAX_TOKENS: dict[int, int] = {32: 15, 16: 8}

# As many streams of weights as the prefetcher follows, and no more panels than leave a register for
# each weight vector beside the accumulators, and these for other things.
_STREAMS = 8
_SPARE_REGISTERS = 2


def build_gemv(
    workload: Workload, machine: X86Machine, weight: StreamedWeight, config: Config
) -> Any:
    """Build the PrimFunc; the weight is packed in panels of one vector of rows."""
    geometry = workload.geometry
    assert isinstance(geometry, MatmulGeometry) and geometry.n is not None
    lanes, tokens = machine.lanes, geometry.n
    panels = math.ceil(geometry.m / lanes)
    fitting = (machine.registers - _SPARE_REGISTERS) // (tokens + 1)
    together = min(panels, _STREAMS // weight.streams, max(1, fitting))
    epilogue = workload.epilogue
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("gemv")
            B.func_attr({"tirx.noalias": True, "op_pattern": 8})
            x = argument("x", (tokens, geometry.k))
            weight.declare()
            channels = [
                B.arg(f"channel{i}", B.Buffer((geometry.m,), "float32"))
                for i in range(epilogue.channels)
            ]
            tensors = [
                argument(f"tensor{i}", (tokens, geometry.m)) for i in range(epilogue.tensors)
            ]
            y = argument("y", (tokens, geometry.m))
            kernel = _Gemv(workload, lanes, x, weight, channels, tensors, y)
            whole, rest = divmod(panels, together)
            with thread_loop(whole, int(config["threads"])) as step:
                kernel.emit(step * together, together)
            if rest:
                kernel.emit(whole * together, rest)
    return builder.get()


class _Gemv:
    """Emits the product of all tokens with some panels of the weight."""

    def __init__(
        self,
        workload: Workload,
        lanes: int,
        x: Any,
        weight: StreamedWeight,
        channels: list[Any],
        tensors: list[Any],
        y: Any,
    ) -> None:
        assert isinstance(workload.geometry, MatmulGeometry)
        self.geometry, self.epilogue = workload.geometry, workload.epilogue
        self.vectors = Vectors(lanes)
        self.x, self.y, self.tensors = flat(x), flat(y), [flat(tensor) for tensor in tensors]
        self.weight, self.channels = weight, channels

    def emit(self, first: Any, count: int) -> None:
        """Multiply panels [first, first + count)."""
        v, g = self.vectors, self.geometry
        assert g.n is not None
        acc = [[v.register() for _ in range(count)] for _ in range(g.n)]
        for row in acc:
            for register in row:
                v.store(register, v.zero())
        self.weight.multiply(acc, self.x, first)
        for token, row in enumerate(acc):
            for p, register in enumerate(row):
                self._store(token, (first + p) * v.lanes, v.load(register))

    def _store(self, token: int, feature: Any, acc: Any) -> None:
        g = self.geometry
        left = T.Cast("int32", g.m - feature) if g.m % self.vectors.lanes else None
        store_features(self, acc, token * g.m + feature, feature, left)
