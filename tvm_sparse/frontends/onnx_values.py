"""Values that are known while compiling, since they depend on constants and known shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the shapes of values as far as ONNX can infer them."""
    try:
        return onnx.shape_inference.infer_shapes(proto)
    except Exception:
        # It raises where a node contradicts itself: nothing more is known then, and the importer
        # says what is wrong.
        return proto


def _known_shapes(proto: onnx.ModelProto) -> dict[str, list[int]]:
    graph = with_shapes(proto).graph
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


def evaluate_node(
    node: onnx.NodeProto, operands: Sequence[np.ndarray], opsets: Any
) -> np.ndarray | None:
    """Compute one node with ONNX's reference, None where that lacks it.

    Parameters
    ----------
    operands : sequence of numpy.ndarray
        The inputs that the node has, in its order.
    opsets
        The `opset_import` of its model.
    """
    names = [name for name in node.input if name]
    feed = dict(zip(names, operands, strict=True))
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in feed.items()
    ]
    result = helper.make_empty_tensor_value_info(node.output[0])
    alone = helper.make_model(
        helper.make_graph([node], "one", values, [result]), opset_imports=opsets
    )
    try:
        results: Any = ReferenceEvaluator(alone).run(None, feed)
        return np.asarray(results[0])
    except Exception:
        # The evaluator lacks the operator or a version of it: the value counts as not known.
        return None
