"""Values that are known while compiling, since they depend on constants and known shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def known_value(proto: onnx.ModelProto, name: str) -> np.ndarray | None:
    """Work a value of the main graph out, None when it is only known at run time.

    Parameters
    ----------
    proto : onnx.ModelProto
        A valid model. Its initialisers are the constants.
    """
    shapes = _known_shapes(proto)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {out: node for node in proto.graph.node for out in node.output}
    needed: dict[str, onnx.NodeProto] = {}
    wanted = [name]
    while wanted:
        value = wanted.pop()
        if not value or value in constants:
            continue
        node = producers.get(value)
        if node is None or any(attr.HasField("g") for attr in node.attribute):
            return None
        if node.op_type in ("Shape", "Size") and node.input[0] in shapes:
            constants[value] = numpy_helper.from_array(_of_shape(node, shapes), value)
        elif node.output[0] not in needed:
            needed[node.output[0]] = node
            wanted.extend(node.input)
    nodes = [node for node in proto.graph.node if node.output and node.output[0] in needed]
    return _evaluate(proto, nodes, list(constants.values()), name)


def _known_shapes(proto: onnx.ModelProto) -> dict[str, list[int]]:
    graph = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {}
    for value in [*graph.value_info, *graph.input]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = [dim.dim_value for dim in tensor.shape.dim]
    return shapes


def _of_shape(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> np.ndarray:
    shape = np.array(shapes[node.input[0]], np.int64)
    if node.op_type == "Size":
        return np.array(np.prod(shape))
    ends = {attr.name: attr.i for attr in node.attribute}
    return shape[ends.get("start") : ends.get("end")]


def _evaluate(
    proto: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    name: str,
) -> np.ndarray | None:
    result = helper.make_empty_tensor_value_info(name)
    graph = helper.make_graph(nodes, "known", [], [result], constants)
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=8)
    try:
        outputs: Any = ReferenceEvaluator(model).run(None, {})
        return np.asarray(outputs[0])
    except Exception:
        # The evaluator lacks an operator or a version of it: the value counts as not known.
        return None
