"""Make constants of what an ONNX graph only rearranges: exporters transpose and reshape weights."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from ..frontends.onnx_values import evaluate_node
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
        operands = [numpy_helper.to_array(tensors[name]) for name in node.input if name]
        value = evaluate_node(node, operands, model.opset_import)
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
