"""Small valid ONNX models that between them use what the front end knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def _weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str] = (2, 4),
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    domains: Sequence[str] = (),
    **more: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)


def _node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"n_{outputs}", **attributes)


def layers() -> onnx.ModelProto:
    """A MatMul with bias and Clip, and a Gemm that is scaled."""
    return _model(
        [
            _node("MatMul", "x w", "a"),
            _node("Add", "a b", "c"),
            _node("Clip", "c low high", "d"),
            _node("Identity", "d", "e"),
            _node("Gemm", "e v b2", "y", alpha=0.5, transB=1),
        ],
        ("batch", 4),
        {
            "w": _weight(4, 3),
            "b": _weight(3),
            "low": np.float32(0).reshape(()),
            "high": np.float32(6).reshape(()),
            "v": _weight(2, 3),
            "b2": _weight(2),
        },
    )


def convolution() -> onnx.ModelProto:
    """A convolution with automatic padding, of an opset that is converted, and pooling."""
    return _model(
        [
            _node("Conv", "x w", "a", auto_pad="SAME_UPPER", kernel_shape=[3, 3], strides=[2, 2]),
            _node("Relu", "a", "r"),
            _node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
            _node("Constant", "", "s", value=numpy_helper.from_array(np.array([1, -1]), "s")),
            _node("Reshape", "p s", "y"),
        ],
        (1, 2, 8, 8),
        {"w": _weight(4, 2, 3, 3)},
        opset=11,
    )


def sparse_weight() -> onnx.ModelProto:
    """A weight that is stored as its nonzeros."""
    model = _model([_node("MatMul", "x w", "y")])
    values = numpy_helper.from_array(_weight(3), "w")
    indices = numpy_helper.from_array(np.array([0, 5, 11]), "w_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    return model


def branches() -> onnx.ModelProto:
    """An If at run time, with a constant in a branch."""
    value = numpy_helper.from_array(_weight(2, 4), "k")
    out = [helper.make_tensor_value_info("t", FLOAT, None)]
    then = helper.make_graph([_node("Add", "x k", "t")], "then", [], out, [value])
    other = helper.make_graph([_node("Relu", "x", "t")], "other", [], out)
    return _model(
        [
            _node("ReduceSum", "x", "s", keepdims=0),
            _node("Greater", "s zero", "c"),
            _node("If", "c", "y", then_branch=then, else_branch=other),
        ],
        constants={"zero": np.float32(0).reshape(())},
    )


def known_branch() -> onnx.ModelProto:
    """An If that shapes decide, over constants made at load."""
    out = [helper.make_tensor_value_info("t", FLOAT, None)]
    then = helper.make_graph([_node("Relu", "x", "t")], "then", [], out)
    other = helper.make_graph([_node("Neg", "x", "t")], "other", [], out)
    fill = numpy_helper.from_array(np.ones(1, np.float32), "f")
    return _model(
        [
            _node("Shape", "x", "s"),
            _node("Gather", "s zero", "rows"),
            _node("Equal", "rows two", "c"),
            _node("If", "c", "a", then_branch=then, else_branch=other),
            _node("ConstantOfShape", "size", "ones", value=fill),
            _node("Add", "a ones", "y"),
        ],
        constants={"zero": np.array(0), "two": np.array(2), "size": np.array([2, 4])},
    )


def loop() -> onnx.ModelProto:
    """A Loop, which is refused."""
    body = helper.make_graph(
        [_node("Identity", "go", "again"), _node("Relu", "v", "w")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", FLOAT, None),
        ],
    )
    return _model(
        [_node("Loop", "n go0 x", "y", body=body)],
        constants={"n": np.array(3), "go0": np.array(True)},
    )


def function() -> onnx.ModelProto:
    """A function of the model's own."""
    proto = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [_node("Add", "a a", "b")],
        [helper.make_opsetid("", 17)],
    )
    call = helper.make_node("Twice", ["x"], ["m"], domain="local")
    return _model(
        [call, _node("MatMul", "m w", "y")],
        constants={"w": _weight(4, 3)},
        domains=["local"],
        functions=[proto],
    )


def masked() -> onnx.ModelProto:
    """A weight whose mask stands in the graph, and a quantised one."""
    return _model(
        [
            _node("Mul", "w_orig w_mask", "w"),
            _node("MatMul", "x w", "a"),
            _node("DequantizeLinear", "q scale", "v"),
            _node("MatMul", "a v", "b"),
            _node("Dropout", "b", "d"),
            _node("Softmax", "d", "y", axis=-1),
        ],
        constants={
            "w_orig": _weight(4, 3),
            "w_mask": (_weight(4, 3) > 0).astype(np.float32),
            "q": np.arange(9, dtype=np.int8).reshape(3, 3),
            "scale": np.float32(0.1).reshape(()),
        },
    )


def external() -> dict[str, bytes]:
    """A weight in a file beside the model."""
    model = layers()
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "weights.bin", "offset": "0", "length": str(len(data))}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return {"model.onnx": model.SerializeToString(), "weights.bin": data}


MODELS = (layers, convolution, sparse_weight, branches, known_branch, loop, function, masked)
