"""A format and a kernel template for float16 and bfloat16 on a processor, in the tables for a test.

The kernel is as plain as can be: three loops, sums and epilogue in float32, one rounding at the
end. It stands for the kernels of other targets, whose results cannot be had on every machine.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B
from tvm_sparse.schedules import lookup
from tvm_sparse.schedules.base import KernelTemplate
from tvm_sparse.schedules.epilogue import EMITTERS, emit_epilogue

from tvm_sparse.dtypes import HALF_TYPES
from tvm_sparse.formats import FORMATS, Match, PackedWeight
from tvm_sparse.formats.base import check_matrix
from tvm_sparse.workload import MatmulGeometry, Workload


class HalfRows:
    """The weight row after row, in its own type."""

    name = "half_rows"

    def supports(self, weight: np.ndarray, config: Any) -> Match:
        return check_matrix(weight, HALF_TYPES)

    def pack(self, weight: np.ndarray, config: Any) -> PackedWeight:
        values = np.ascontiguousarray(weight).reshape(-1)
        return PackedWeight(self.name, weight.shape, {}, {"values": values})

    def unpack(self, packed: PackedWeight) -> np.ndarray:
        return packed.arrays["values"].reshape(packed.shape)

    def order(self, packed: PackedWeight) -> None:
        return None


class Scalars:
    """Epilogues on one float32 at a time."""

    def splat(self, scalar: Any) -> Any:
        return scalar

    def keep(self, value: Any) -> Any:
        kept = B.alloc_buffer((1,), "float32", scope="global")
        B.buffer_store(kept, value, [0])
        return kept[0]

    def apply(self, name: str, inputs: Any) -> Any:
        return T.erf(inputs[0]) if name == "erf" else EMITTERS[name](inputs, 1)


def build(workload: Workload, machine: Any, packed: PackedWeight, config: Any, off: float = 0.0):
    """Build the kernel; what is added to each sum makes it wrong."""
    g, dtype, epilogue = workload.geometry, workload.dtype, workload.epilogue
    assert isinstance(g, MatmulGeometry)
    tokens = tirx.Var("n", "int64") if g.n is None else g.n
    with IRBuilder() as ib, B.prim_func(s_tir=True):
        B.func_name("half_rows")
        B.func_attr({"tirx.noalias": True})
        x = B.arg("x", B.Buffer((tokens, g.k), dtype))
        values = B.arg("values", B.Buffer((g.m * g.k,), dtype))
        channels = [B.arg(f"channel{i}", B.Buffer((g.m,), dtype)) for i in range(epilogue.channels)]
        tensors = [
            B.arg(f"tensor{i}", B.Buffer((tokens, g.m), dtype)) for i in range(epilogue.tensors)
        ]
        y = B.arg("y", B.Buffer((tokens, g.m), dtype))
        with B.sblock("root"), B.serial(0, tokens) as n, B.serial(0, g.m) as m:
            acc = B.alloc_buffer((1,), "float32", scope="global")
            B.buffer_store(acc, T.float32(off), [0])
            with B.serial(0, g.k) as k:
                product = x[n, k].astype("float32") * values[m * g.k + k].astype("float32")
                B.buffer_store(acc, acc[0] + product, [0])
            result = emit_epilogue(
                epilogue,
                acc[0],
                lambda i: channels[i][m].astype("float32"),
                lambda i: tensors[i][n, m].astype("float32"),
                Scalars(),
            )
            B.buffer_store(y, result.astype(dtype), [n, m])
    return ib.get()


def supports(workload: Workload, machine: Any) -> Match:
    in_rows = isinstance(workload.geometry, MatmulGeometry) and workload.geometry.layout == "rows"
    return Match(in_rows, "" if in_rows else "only for matrix products in rows")


def template(**changes: Any) -> KernelTemplate:
    parts: dict[str, Any] = {
        "name": "half_rows",
        "format": "half_rows",
        "supports": supports,
        "space": lambda workload, machine: [{}],
        "build": build,
        "events": lambda *_: {},
        "estimate": lambda *_: 1.0,
        "dtypes": HALF_TYPES,
    }
    return KernelTemplate(**{**parts, **changes})


@contextlib.contextmanager
def half_templates(monkeypatch: Any, *templates: KernelTemplate):
    """Put templates into the tables of a processor's kernels."""
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "half_rows", HalfRows())
        patch.setattr(lookup, "X86_TEMPLATES", (*lookup.X86_TEMPLATES, *templates))
        patch.setattr(lookup, "ALL_TEMPLATES", (*lookup.ALL_TEMPLATES, *templates))
        yield
