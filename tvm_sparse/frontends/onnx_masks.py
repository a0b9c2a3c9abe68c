"""Masks that pruning tools leave in an ONNX graph: multiplied into the weights that they hide.

A tool that prunes while training keeps the weight and a mask of zeros and ones beside it. Exported
before the mask is made permanent, the graph computes their product at every call, and no zero
stands in a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import onnx

from ..dtypes import is_float
from .mask_names import is_binary, plain_name
from .onnx_graph import all_nodes, rename_values, replace_nodes
from .onnx_values import evaluate_node

# What stands between a constant and the product with its mask, or makes the mask.
_BETWEEN = {
    "And",
    "Cast",
    "CastLike",
    "Equal",
    "Expand",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "Less",
    "LessOrEqual",
    "Mul",
    "Not",
    "Or",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "Where",
}
_MASKING = ("Mul", "Where")


def fold_masks(
    graph: onnx.GraphProto,
    opsets: Any,
    stored: Collection[str],
    read: Callable[[str], np.ndarray],
) -> dict[str, np.ndarray]:
    """Take products of a constant and a mask out of a graph, which is changed in place.

    Parameters
    ----------
    graph : onnx.GraphProto
        In topological order.
    opsets
        The model's `opset_import`.
    stored : collection of str
        Names of all constants.
    read : callable
        Returns the value of a constant; called for those only that a product may need.

    Returns
    -------
    dict of str to numpy.ndarray
        What the graph reads now in place of the products. Where the weight is called ``x_orig``, or
        ``parametrizations.x.original``, the product is called ``x``.
    """
    folder = _Folder(graph, opsets, stored, read)
    found = dict(folder.products())
    if not found:
        return {}
    replace_nodes(graph, [node for node in graph.node if not set(node.output) & found.keys()])
    taken = {name for node in all_nodes(graph) for name in (*node.input, *node.output)}
    taken |= {value.name for value in graph.input} | set(stored)
    renames = {}
    for name in found:
        plain = plain_name(folder.weight_of(name))
        if plain not in taken:
            renames[name] = plain
            taken.add(plain)
    rename_values(graph, renames)
    return {renames.get(name, name): value for name, value in found.items()}


class _Folder:
    """What can be known about products of constants, without computing those that do not matter."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        opsets: Any,
        stored: Collection[str],
        read: Callable[[str], np.ndarray],
    ) -> None:
        self.opsets, self.read = opsets, read
        self.makers: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            known = all(not name or name in stored or name in self.makers for name in node.input)
            if known and node.op_type in _BETWEEN and node.domain in ("", "ai.onnx"):
                self.makers[node.output[0]] = node
        self.outputs = {value.name for value in graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in all_nodes(graph):
            for name in node.input:
                self.readers[name].append(node)

    def products(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the masked weights, each behind its last mask and before it is rearranged."""
        for name, node in self.makers.items():
            if node.op_type in _MASKING and name not in self.outputs and self._escapes(name):
                value, masked = self._value(name)
                if masked and value is not None and value.ndim >= 2 and is_float(value.dtype):
                    yield name, value

    def _escapes(self, name: str) -> bool:
        """Say whether something reads a value that is no step to another product of constants."""
        for node in self.readers[name]:
            result = node.output[0]
            if result not in self.makers:
                return True
            if node.op_type not in _MASKING and (result in self.outputs or self._escapes(result)):
                return True
        return False

    def _value(self, name: str) -> tuple[np.ndarray | None, bool]:
        """Compute a value, and say whether a mask was applied on the way to it."""
        node = self.makers.get(name)
        if node is None:
            return self.read(name), False
        parts = [self._value(source) for source in node.input if source]
        operands = [value for value, _ in parts if value is not None]
        if len(operands) != len(parts):
            return None, False
        masked = any(flag for _, flag in parts) or _applies_mask(node, operands)
        return evaluate_node(node, operands, self.opsets), masked

    def weight_of(self, name: str) -> str:
        """Name the constant that is masked, where its name tells and its layout stays.

        Otherwise the product keeps its own name.
        """
        return next((leaf for leaf in self._leaves(name) if plain_name(leaf) != leaf), name)

    def _leaves(self, name: str) -> Iterator[str]:
        node = self.makers.get(name)
        if node is None:
            yield name
        elif node.op_type in (*_MASKING, "Cast", "Identity"):
            for source in node.input:
                yield from self._leaves(source)


def _applies_mask(node: onnx.NodeProto, operands: list[np.ndarray]) -> bool:
    if node.op_type == "Where":
        return not all(np.any(branch) for branch in operands[1:])
    return node.op_type == "Mul" and any(x.size > 1 and is_binary(x) for x in operands)
