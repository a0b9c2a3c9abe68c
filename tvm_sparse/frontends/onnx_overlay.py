"""The weights of an ONNX graph, under the names that they had before an exporter changed them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from ..dtypes import is_float
from ..files import read_onnx as read_whole
from .checkpoint import open_checkpoint
from .onnx_file import read_onnx
from .onnx_graph import all_nodes
from .onnx_masks import fold_masks
from .overlay import Overlay, Target, lay_over, listed

# Operator -> the operand that is its weight.
_WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


def lay_over_graph(
    graph: onnx.GraphProto, constants: Mapping[str, np.ndarray], weights: Any
) -> Overlay:
    """Match a checkpoint with the constants of a graph.

    Parameters
    ----------
    weights
        As for `open_tensors`.

    Raises
    ------
    ModelError
        As for `lay_over`.
    """
    return lay_over(_targets(graph, constants), open_checkpoint(weights))


def with_weights(model: Any, weights: Any) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return a copy of an ONNX model with a checkpoint's weights, and sentences about them.

    Parameters
    ----------
    model : path or onnx.ModelProto
        Masks in its graph are multiplied in first.
    weights
        As for `open_tensors`.

    Raises
    ------
    ModelError
        When one of them cannot be read, or as for `lay_over`.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else read_whole(model))
    masks = fold_masks_of(proto)
    overlay = lay_over_graph(proto.graph, read_onnx(proto).constants, weights)
    replace_initializers(proto.graph, overlay.values)
    return proto, (*masked_notes(masks), *overlay.notes)


def fold_masks_of(proto: onnx.ModelProto) -> list[str]:
    """Multiply masks into the weights of a model, in place; return what the weights are called."""
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    folded = fold_masks(
        graph, proto.opset_import, stored, lambda name: onnx.numpy_helper.to_array(stored[name])
    )
    replace_initializers(graph, folded)
    if folded:
        _drop_unread(graph)
    return list(folded)


def masked_notes(names: list[str]) -> list[str]:
    """Say which weights had their masks in the graph."""
    if not names:
        return []
    return [f"masks stood in the graph and were multiplied into their weights: {listed(names)}"]


def replace_initializers(graph: onnx.GraphProto, values: Mapping[str, np.ndarray]) -> None:
    """Give initialisers new values, and add those that are new."""
    kept = [tensor for tensor in graph.initializer if tensor.name not in values]
    sparse = [t for t in graph.sparse_initializer if t.values.name not in values]
    del graph.initializer[:], graph.sparse_initializer[:]
    graph.initializer.extend(kept)
    graph.sparse_initializer.extend(sparse)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in values.items()
    )


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and initialisers that no output depends on."""
    read = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if read.isdisjoint(node.output):
            continue
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        read.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                read.update(name for n in all_nodes(inner) for name in n.input)
                read.update(value.name for value in inner.output)
    del graph.node[:]
    graph.node.extend(nodes[::-1])
    unread = {tensor.name for tensor in graph.initializer} - read
    for values in (graph.initializer, graph.input):
        for item in [item for item in values if item.name in unread]:
            values.remove(item)


def _targets(graph: onnx.GraphProto, constants: Mapping[str, np.ndarray]) -> list[Target]:
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in all_nodes(graph):
        for index, name in enumerate(node.input):
            readers[name].append((node, index))
    return [
        _target(name, value, readers[name])
        for name, value in constants.items()
        if value.ndim >= 1 and is_float(value.dtype)
    ]


def _target(name: str, value: np.ndarray, readers: list[tuple[onnx.NodeProto, int]]) -> Target:
    uses = [node for node, index in readers if _WEIGHTS.get(node.op_type) == index]
    paths = dict.fromkeys(path for node in uses for path in _module_paths(node))
    # A name with a dot is a parameter's; what exporters call their results has none.
    renamed = "." not in name.removeprefix("onnx::")
    return Target(
        name,
        value,
        tuple(f"{path}.weight" for path in paths) if renamed else (),
        matrix=bool(uses) and all(node.op_type in ("Gemm", "MatMul") for node in uses),
        columns=any(_reads_columns(node) for node in uses),
        folded=renamed and any(node.op_type not in ("Gemm", "MatMul") for node in uses),
    )


def _reads_columns(node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMul" or not any(a.name == "transB" and a.i for a in node.attribute)


def _module_paths(node: onnx.NodeProto) -> list[str]:
    """Name the PyTorch module that a node came from, as PyTorch's two exporters write it."""
    found = []
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = [str(scope) for scope in ast.literal_eval(entry.value)]
            except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
                # The last two: brackets within brackets, as many as no exporter writes.
                continue
            # The last one is the operator's own.
            found += [scope for scope in scopes[-2:-1] if scope]
    if node.name.startswith("/"):
        path = ".".join(node.name[1:].split("/")[:-1])
        found += [path] if path else []
    return found
