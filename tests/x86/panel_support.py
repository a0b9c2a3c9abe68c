"""Shared by the tests of weight kernels: run any template on any workload against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm
import tvm_ffi
from dense_support import machine, target_of
from layer_reference import operands, reference
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.lookup import template_named

from tvm_sparse.check import compare
from tvm_sparse.formats import FORMATS


@dataclass(frozen=True)
class BuiltKernel:
    """A compiled kernel and its weight: call it with x, `arrays`, the epilogue's operands, y."""

    call: Callable[..., None]
    arrays: Sequence[np.ndarray]

    def run(self, x, channels, tensors, shape):
        """Compute y; what the kernel leaves out stays NaN."""
        inputs = [x, *self.arrays, *channels, *tensors]
        y = tvm.runtime.tensor(np.full(shape, np.nan, "float32"))
        self.call(*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs], y)
        return y.numpy()


_compiled: dict[tuple[int, int], Callable[..., None]] = {}


def build_kernel(template, workload, weight, lanes, config):
    """Pack a weight and compile its kernel; functions that are equal are compiled once."""
    packed = FORMATS[template.format].pack(matrix_view(weight, workload.op), config)
    function = template.build(workload, machine(lanes, workload.threads), packed, config)
    function = function.with_attr("global_symbol", "kernel")
    key = lanes, tvm_ffi.structural_hash(function)
    if key not in _compiled:
        _compiled[key] = tvm.compile(function, target_of(lanes))["kernel"]
    return BuiltKernel(_compiled[key], template.arguments(workload, packed))


def batch_of(workload):
    """Tokens or images of one call."""
    return workload.geometry.n if workload.op == "matmul" else workload.geometry.batch


def check_kernel(
    template_name, workload, weight, lanes, config=None, batch=None, seed=0, threads=1
):
    """Build, run and compare one kernel on random activations."""
    template = template_named(template_name)
    workload = replace(workload, threads=threads)
    cpu = machine(lanes, threads)
    assert template.supports(workload, cpu)
    config = dict(template.space(workload, cpu)[0], **(config or {}))
    kernel = build_kernel(template, workload, weight, lanes, config)
    x, channels, tensors, shape = operands(workload, batch or batch_of(workload), seed)
    got = kernel.run(x, channels, tensors, shape)
    want, bound = reference(workload, weight, x, channels, tensors)
    result = compare(f"{template_name} {config}", got, want, bound)
    assert result.ok, result
    return result
