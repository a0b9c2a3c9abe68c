"""Shared by the tests of weight kernels: run any template on any workload against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm
import tvm_ffi
from dense_support import machine, target_of
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.lookup import template_named

from tvm_sparse.check import compare, dot_bound
from tvm_sparse.epilogue_reference import evaluate64
from tvm_sparse.float64 import ConvAttributes, conv2d64
from tvm_sparse.formats import FORMATS
from tvm_sparse.workload import Epilogue, EpilogueOp, EpilogueRef, MatmulGeometry

ACC = EpilogueRef("acc")


def node(index):
    return EpilogueRef("node", index)


def scalar(value):
    return EpilogueRef("scalar", value=value)


BIAS = Epilogue((EpilogueOp("add", (ACC, EpilogueRef("channel", 0))),), channels=1)
BIAS_RESIDUAL_RELU = Epilogue(
    (
        EpilogueOp("add", (ACC, EpilogueRef("channel", 0))),
        EpilogueOp("add", (node(0), EpilogueRef("tensor", 0))),
        EpilogueOp("maximum", (node(1), scalar(0.0))),
    ),
    channels=1,
    tensors=1,
)
BIAS_GELU = Epilogue(
    (EpilogueOp("add", (ACC, EpilogueRef("channel", 0))), EpilogueOp("gelu", (node(0),))),
    channels=1,
)
EPILOGUES = {
    "none": Epilogue(),
    "bias": BIAS,
    "bias+residual+relu": BIAS_RESIDUAL_RELU,
    "bias+gelu": BIAS_GELU,
}


def weight_for(geometry, density, seed):
    """Draw OIHW or [k, m] weights; some rows and columns are empty."""
    rng = np.random.default_rng(seed)
    rows, columns = geometry.weight_shape
    w = rng.standard_normal((rows, columns)).astype("float32")
    w *= rng.random((rows, columns)) < density
    w[rng.random(rows) < 0.1] = 0
    w[:, rng.random(columns) < 0.1] = 0
    if isinstance(geometry, MatmulGeometry):
        return np.ascontiguousarray(w.T)
    return w.reshape(rows, geometry.in_channels // geometry.groups, *geometry.kernel)


def operands(workload, batch, seed):
    """Draw the activations, the epilogue's operands, and name the result's shape."""
    rng = np.random.default_rng(seed + 1)
    g = workload.geometry
    if workload.op == "matmul":
        x, shape, features = (batch, g.k), (batch, g.m), g.m
    else:
        x = (batch, g.in_channels, g.in_height, g.in_width)
        shape, features = (batch, g.out_channels, g.out_height, g.out_width), g.out_channels
    draw = lambda size: rng.standard_normal(size).astype("float32")  # noqa: E731
    channels = [draw(features) for _ in range(workload.epilogue.channels)]
    tensors = [draw(shape) for _ in range(workload.epilogue.tensors)]
    return draw(x), channels, tensors, shape


def reference(workload, weight, x, channels, tensors):
    """Compute the result in float64, and what a float32 kernel may differ by."""
    g = workload.geometry
    if workload.op == "matmul":
        wide = weight.astype("float64")
        acc = x.astype("float64") @ wide
        magnitude, terms = np.abs(x).astype("float64") @ np.abs(wide), g.k
        shape = (-1,)
    else:
        conv = ConvAttributes(g.strides, g.padding, g.dilation, g.groups)
        acc = conv2d64(x, weight, conv)
        magnitude, terms = conv2d64(np.abs(x), np.abs(weight), conv), g.weight_shape[1]
        shape = (-1, 1, 1)
    vectors = [vector.reshape(shape) for vector in channels]
    return evaluate64(workload.epilogue, acc, dot_bound(magnitude, terms), vectors, tensors)


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
