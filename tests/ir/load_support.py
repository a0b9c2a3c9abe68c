"""Small ONNX graphs, and the evaluation of canonical models with TVM's own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax
from tvm_sparse.passes.rewrite_main import bindings_of, main_of

from tvm_sparse.model import Model

Shape = tuple[Any, ...]


def onnx_model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, Shape],
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run_model(model: Model, *inputs: np.ndarray) -> list[np.ndarray]:
    """Run a canonical model with TVM's own kernels."""
    executable = tvm.compile(model.mod, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    arrays = [*inputs, *model.params.values()]
    result = machine["main"](*[tvm.runtime.tensor(np.asarray(a, order="C")) for a in arrays])
    return [result.numpy()] if hasattr(result, "numpy") else [item.numpy() for item in result]


def run_onnx(model: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def ops_of(model: Model) -> list[str]:
    """Names of the operators of `main`, in order."""
    values = [binding.value for binding in bindings_of(main_of(model.mod))]
    return [v.op.name.removeprefix("relax.") for v in values if isinstance(v, relax.Call)]


def assert_close(actual: np.ndarray, expected: np.ndarray, steps: int = 64) -> None:
    """Compare with an error bound of `steps` roundings of the largest value."""
    assert actual.shape == expected.shape
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=steps * 1.2e-7 * scale)
