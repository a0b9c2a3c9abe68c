"""Make constants of what an ONNX graph only rearranges: exporters transpose and reshape weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .channel_graph import captured

_REARRANGING = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace, in place, the nodes that rearrange constants by what they make."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors.update(
        {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
    )
    results = {value.name for value in graph.output}
    folded = []
    for node in graph.node:
        known = node.op_type in _REARRANGING and all(name in tensors for name in node.input if name)
        if not known or node.output[0] in results:
            continue
        value = _evaluate(model, node, [numpy_helper.to_array(tensors[n]) for n in node.input if n])
        if value is not None:
            tensors[node.output[0]] = numpy_helper.from_array(value, node.output[0])
            folded.append(node)
    graph.initializer.extend(tensors[node.output[0]] for node in folded)
    for node in folded:
        graph.node.remove(node)
    _drop_unread(graph, {name for node in folded for name in node.input})


def _drop_unread(graph: onnx.GraphProto, names: set[str]) -> None:
    """Remove those of the constants called `names` that nothing reads any more."""
    read = {name for node in graph.node for name in (*node.input, *captured(node))}
    unread = names - read - {value.name for value in graph.output}
    for values in (graph.initializer, graph.input):
        for value in [value for value in values if value.name in unread]:
            values.remove(value)
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        if node.output[0] in unread:
            graph.node.remove(node)


def _evaluate(
    model: onnx.ModelProto, node: onnx.NodeProto, operands: list[np.ndarray]
) -> np.ndarray | None:
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in zip(names, operands, strict=True)
    ]
    result = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UNDEFINED, None)
    alone = helper.make_model(
        helper.make_graph([node], "one", values, [result]), opset_imports=model.opset_import
    )
    feed = dict(zip(names, operands, strict=True))
    try:
        results: Any = ReferenceEvaluator(alone).run(None, feed)
        return np.asarray(results[0])
    except Exception:
        # Whatever the reference lacks stays in the graph.
        return None
