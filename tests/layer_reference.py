"""Random layers and their float64 results, for the tests of kernels on any target."""

from __future__ import annotations

import numpy as np

from tvm_sparse.check import rounded_bound, typed_dot_bound
from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.epilogue_reference import evaluate64
from tvm_sparse.float64 import ConvAttributes, conv2d64
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


def weight_for(geometry, density, seed, dtype="float32"):
    """Draw OIHW or [k, m] weights, rounded to a type; some rows and columns are empty."""
    rng = np.random.default_rng(seed)
    rows, columns = geometry.weight_shape
    w = rng.standard_normal((rows, columns)).astype("float32")
    w *= rng.random((rows, columns)) < density
    w[rng.random(rows) < 0.1] = 0
    w[:, rng.random(columns) < 0.1] = 0
    w = w.astype(numpy_dtype(dtype))
    if isinstance(geometry, MatmulGeometry):
        return np.ascontiguousarray(w.T)
    return w.reshape(rows, geometry.in_channels // geometry.groups, *geometry.kernel)


def operands(workload, batch, seed):
    """Draw the activations and the epilogue's operands in the workload's type; name y's shape."""
    rng = np.random.default_rng(seed + 1)
    g = workload.geometry
    if workload.op == "matmul":
        x, shape, features = (batch, g.k), (batch, g.m), g.m
    else:
        x = (batch, g.in_channels, g.in_height, g.in_width)
        shape, features = (batch, g.out_channels, g.out_height, g.out_width), g.out_channels
    dtype = numpy_dtype(workload.dtype)
    draw = lambda size: rng.standard_normal(size).astype("float32").astype(dtype)  # noqa: E731
    channels = [draw(features) for _ in range(workload.epilogue.channels)]
    tensors = [draw(shape) for _ in range(workload.epilogue.tensors)]
    return draw(x), channels, tensors, shape


def reference(workload, weight, x, channels, tensors, on_tensor_cores=False):
    """Compute the result in float64, and what a kernel's may differ by.

    Kernels multiply, add up and compute their epilogue in float32 whatever the workload's type is;
    results of a narrower one are rounded to it once, at the end.
    """
    g = workload.geometry
    x, weight = x.astype("float32"), weight.astype("float32")
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
    value, bound = evaluate64(
        workload.epilogue,
        acc,
        typed_dot_bound(magnitude, terms, workload.dtype, on_tensor_cores=on_tensor_cores),
        vectors,
        tensors,
    )
    return value, rounded_bound(value, bound, workload.dtype)
