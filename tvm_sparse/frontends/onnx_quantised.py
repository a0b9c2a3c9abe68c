"""Which layers of an ONNX graph keep their weight as integers, and how."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

# Operators that are quantised by their own definition, and the input that is the weight.
_INTEGER_PRODUCTS = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulNBits": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}

_PRODUCTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}
_REARRANGING = ("Cast", "Identity", "Reshape", "Transpose")


def quantised_weights(graph: onnx.GraphProto, stored: Iterable[str] = ()) -> dict[str, str]:
    """Find the layers whose weight is quantised.

    Parameters
    ----------
    stored : iterable of str
        Constants that are kept apart from the graph.

    Returns
    -------
    dict of str to str
        How, by the layer's name: "QLinearConv", or "behind a DequantizeLinear" where a float
        product reads integers, or floats that are rounded to integers and back.
    """
    constants = set(stored) | {tensor.name for tensor in graph.initializer}
    constants |= {tensor.values.name for tensor in graph.sparse_initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    producers = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        name = node.name or node.output[0]
        index = _INTEGER_PRODUCTS.get(node.op_type, len(node.input))
        if index < len(node.input) and node.input[index] in constants:
            found[name] = node.op_type
        for index in _PRODUCTS.get(node.op_type, ()):
            if index >= len(node.input):
                # An operator of another domain that has the name.
                continue
            if quantiser := _quantiser(node.input[index], producers, constants):
                found[name] = f"behind a {quantiser}"
    return found


def _quantiser(name: str, producers: dict[str, onnx.NodeProto], constants: set[str]) -> str:
    """Name the quantising operator between a layer and a constant, if that is all there is."""
    found = ""
    while name not in constants:
        node = producers.get(name)
        if node is None:
            return ""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found = found or node.op_type
        elif node.op_type not in _REARRANGING:
            return ""
        name = next(iter(node.input), "")
    return found
