"""Shared by the tests of dense kernels: targets that run here, compiling, calling, error bounds."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tvm
from tvm.target import codegen

from tvm_sparse.targets import machine_of

EPS = float(np.finfo("float32").eps)

# Vector lanes -> the processor compiled for, and the instruction set it needs to run.
WIDTHS = {16: ("x86-64-v4", "avx512f"), 8: ("x86-64-v3", "avx2"), 4: ("x86-64-v2", "sse4.1")}


@functools.cache
def features():
    native = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}
    return frozenset(codegen.llvm_get_cpu_features(tvm.target.Target(native)))


def target_of(lanes):
    mcpu, feature = WIDTHS[lanes]
    if feature not in features():
        pytest.skip(f"this processor lacks {feature}")
    return tvm.target.Target({"kind": "llvm", "mcpu": mcpu})


def machine(lanes, threads=1):
    return machine_of(target_of(lanes), threads)


def run(func, lanes, inputs, out_shape):
    """Compile a kernel whose last parameter is its output, and call it with guard zones behind."""
    library = tvm.compile(func.with_attr("global_symbol", "kernel"), target_of(lanes))
    out = tvm.runtime.tensor(np.full(out_shape, np.nan, "float32"))
    library["kernel"](*[tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs], out)
    return out.numpy()
