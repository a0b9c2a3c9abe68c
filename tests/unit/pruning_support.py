"""Small models for the tests of pruning."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def matmul_model(*weights: np.ndarray) -> onnx.ModelProto:
    """A chain-free model: every weight multiplies the same kind of input on its own."""
    nodes, inputs, outputs = [], [], []
    for index, weight in enumerate(weights):
        nodes.append(
            helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"y{index}"], name=f"m{index}")
        )
        kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
        inputs.append(helper.make_tensor_value_info(f"x{index}", kind, ["n", weight.shape[0]]))
        outputs.append(helper.make_tensor_value_info(f"y{index}", kind, ["n", weight.shape[1]]))
    tensors = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
