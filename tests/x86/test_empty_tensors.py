"""Tensors without elements go through every kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_sparse as ts

node = helper.make_node


def pruned(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * (rng.random(shape) < 0.2)).astype(np.float32)


@dataclass(frozen=True)
class Network:
    """Nodes from x to y; `row` and `result` are the shapes behind the batch."""

    nodes: list[onnx.NodeProto]
    weights: dict[str, np.ndarray]
    row: tuple[int, ...]
    result: tuple[int, ...]

    def model(self, batch: Any = "n") -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, (batch, *self.row))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8)


MATMULS = Network(
    [
        node("MatMul", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Gemm", ["b", "v"], ["y"], transB=1),
    ],
    {"w": pruned(64, 128), "v": pruned(32, 128)},
    (64,),
    (32,),
)
CONVOLUTIONS = Network(
    [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["b", "v"], ["c"]),
        node("GlobalAveragePool", ["c"], ["y"]),
    ],
    {"w": pruned(16, 8, 3, 3), "v": pruned(32, 16, 1, 1)},
    (8, 16, 16),
    (32, 1, 1),
)
ATTENTION = Network(
    [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["x", "t"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "x"], ["o"]),
        node("LayerNormalization", ["o", "g"], ["y"]),
    ],
    {"g": np.ones(64, np.float32)},
    (7, 64),
    (7, 64),
)


def check(network: Network, force: dict[str, str], threads: int = 1) -> None:
    plan = ts.plan(network.model(), threads=threads, force=force)
    module = ts.compile(network.model(), plan=plan, check=False)
    for batch in (0, 2):
        x = np.zeros((batch, *network.row), np.float32)
        assert module(x).shape == (batch, *network.result)


@pytest.mark.parametrize("force", ["dense", "register_tiled", "sliced_ell"])
@pytest.mark.parametrize("network", [MATMULS, CONVOLUTIONS], ids=["matmuls", "convolutions"])
def test_an_empty_batch_of_layers_with_weights(network: Network, force: str) -> None:
    check(network, {"*": force})


@pytest.mark.parametrize("network", [MATMULS, CONVOLUTIONS], ids=["matmuls", "convolutions"])
def test_an_empty_batch_on_two_threads(network: Network) -> None:
    check(network, {}, threads=2)


def test_an_empty_batch_of_attention() -> None:
    check(ATTENTION, {})


@pytest.mark.parametrize("shape", [(64, 0), (0, 64)])
def test_a_weight_without_elements(shape: tuple[int, int]) -> None:
    network = Network(
        [node("MatMul", ["x", "w"], ["y"])], {"w": np.zeros(shape, np.float32)}, shape[:1], ()
    )
    module = ts.compile(network.model(), check=False)
    y = module(np.ones((3, shape[0]), np.float32))
    np.testing.assert_array_equal(y, np.zeros((3, shape[1]), np.float32))
