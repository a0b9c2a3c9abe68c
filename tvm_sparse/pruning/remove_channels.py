"""Remove the output channels of an ONNX model that are zero, through the whole graph.

A layer whose row of weights is zero makes a constant: its bias. That constant is followed through
activations, normalisations, additions and pooling to the layers that read it, is folded into their
biases, and the channel is cut out of everything between. So is a channel that no layer reads. Where
the graph does something that is not known here, or a constant that is not zero meets padding, the
channel stays as it is, with the reason. Every tensor keeps a channel at least.

The smaller model computes the same to rounding, for inputs that lead to finite numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .channel_graph import ChannelGraph, Channels, Product, captured, name_of
from .channel_rules import follow
from .fold_constants import fold_constants


@dataclass(frozen=True)
class ChannelRemoval:
    """What became of the output channels of one layer.

    Attributes
    ----------
    layer : str
        Its name.
    channels : int
        How many there were.
    removed : int
        How many of them are gone.
    left : int
        How many are constant and stay.
    reason : str
        Why those stay; empty when there are none.
    """

    layer: str
    channels: int
    removed: int
    left: int = 0
    reason: str = ""

    def __str__(self) -> str:
        text = f"channels: {self.layer}: {self.removed} of {self.channels} removed"
        return f"{text}; {self.left} zero ones stay: {self.reason}" if self.left else text


def remove_dead_channels(
    model: onnx.ModelProto,
) -> tuple[onnx.ModelProto, tuple[ChannelRemoval, ...]]:
    """Cut zero channels out of a model; the one that was given is not changed.

    Returns
    -------
    onnx.ModelProto
        A smaller copy.
    tuple of ChannelRemoval
        The layers with channels that went, or that are zero and stay, in the order of the graph.

    Raises
    ------
    ModelError
        When the shapes of the model cannot be inferred.
    """
    current = onnx.ModelProto()
    current.CopyFrom(model)
    fold_constants(current)
    found: dict[str, ChannelRemoval] = {}
    # A layer that lost its last inputs makes constants in its turn.
    while True:
        graph = ChannelGraph(current)
        follow(graph)
        removal = _Removal(graph)
        _report(removal, found)
        if not removal.classes:
            break
        removal.apply()
    changed = tuple(entry for entry in found.values() if entry.removed or entry.left)
    if not any(entry.removed for entry in changed):
        current.CopyFrom(model)
    return current, changed


def _report(removal: _Removal, found: dict[str, ChannelRemoval]) -> None:
    for product in removal.graph.products:
        name, outputs = name_of(product.node), product.outputs
        gone = ~removal.kept(outputs.ids)
        dead = ~(product.rows != 0).any(axis=(1, 2)) & ~gone
        reasons = [removal.reason(int(member)) for member in outputs.ids[dead]]
        before = found.get(name, ChannelRemoval(name, len(outputs), 0))
        found[name] = ChannelRemoval(
            name,
            before.channels,
            before.removed + int(np.count_nonzero(gone)),
            len(reasons),
            max(reasons, key=reasons.count, default=""),
        )


class _Removal:
    """Which classes of channels go, and the changes that follow from it."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.reasons = graph.reasons_by_class()
        roots = {graph.root(member) for c in graph.channels.values() for member in c.ids}
        self.classes = roots - set(self.reasons)
        self._leave_one_each()
        self.names = {name for node in graph.model.graph.node for name in node.input}
        self.names |= {tensor.name for tensor in graph.model.graph.initializer}
        self.values: dict[str, np.ndarray] = {}

    def _leave_one_each(self) -> None:
        """Keep a channel of every tensor that would lose all of its."""
        for channels in self.graph.channels.values():
            if len(channels) and not self.kept(channels.ids).any():
                root = self.graph.root(int(channels.ids[0]))
                self.classes.discard(root)
                self.reasons[root] = "a layer keeps one channel at least"

    def kept(self, ids: np.ndarray) -> np.ndarray:
        """Say which channels stay."""
        return np.array([self.graph.root(int(i)) not in self.classes for i in ids], bool)

    def reason(self, member: int) -> str:
        """Say why a channel stays."""
        return self.reasons.get(self.graph.root(member), "")

    def apply(self) -> None:
        """Change the model."""
        graph = self.graph.model.graph
        for part in self.graph.slices:
            kept = self.kept(part.ids)
            if not kept.all():
                array = self._value(part.node, part.index)
                self._set(part.node, part.index, np.compress(kept, array, axis=part.axis))
        for product in self.graph.products:
            self._shrink(product)
        for count in self.graph.resizes:
            kept = self.kept(count.ids)
            if kept.all():
                continue
            if count.attribute:
                _set_attribute(count.node, count.attribute, int(kept.sum()))
            else:
                target = np.array(self._value(count.node, 1))
                target[count.position] = kept.sum()
                self._set(count.node, 1, target)
        self._store(graph)

    def _shrink(self, product: Product) -> None:
        node, rows = product.node, self.kept(product.outputs.ids)
        inputs = product.inputs
        columns = np.ones(product.rows.shape[1], bool) if inputs is None else self.kept(inputs.ids)
        if rows.all() and columns.all():
            return
        weight = self._value(node, 1)
        weight = np.compress(rows, weight, axis=product.row_axis)
        self._set(node, 1, np.compress(columns, weight, axis=product.column_axis))
        moved = None if inputs is None else _folded(product, inputs, ~columns)
        if moved is not None:
            bias = moved if product.bias is None else product.bias + moved
            self._set_bias(product, bias[rows], weight.dtype)
        elif product.bias is not None and not rows.all():
            self._set_bias(product, product.bias[rows], weight.dtype)

    def _set_bias(self, product: Product, bias: np.ndarray, dtype: np.dtype) -> None:
        node = product.node
        if node.op_type == "MatMul":
            self._add_after(product, bias.astype(dtype))
            return
        beta = product.beta or 1.0
        if product.beta == 0:
            _set_attribute(node, "beta", 1.0)
        if len(node.input) < 3:
            node.input.append("")
        self._set(node, 2, (bias / beta).astype(dtype))

    def _add_after(self, product: Product, bias: np.ndarray) -> None:
        """Give a MatMul the bias that it has no place for."""
        node, graph = product.node, self.graph.model.graph
        result = node.output[0]
        inner = self._unused(f"{result}_product")
        name = self._unused(f"{result}_bias")
        node.output[0] = inner
        self.values[name] = bias
        added = helper.make_node("Add", [inner, name], [result], name=f"{name_of(node)}_bias")
        graph.node.insert(list(graph.node).index(node) + 1, added)

    def _value(self, node: onnx.NodeProto, index: int) -> np.ndarray:
        name = node.input[index]
        if name in self.values:
            return self.values[name]
        value = self.graph.constant(name)
        assert value is not None, "only constants are cut"
        return value

    def _set(self, node: onnx.NodeProto, index: int, value: np.ndarray) -> None:
        """Give a node a constant of its own, under the old name where nobody else reads it."""
        name = node.input[index]
        alone = name and len(self.graph.users.get(name, ())) == 1
        if name not in self.values and (not alone or name in self.graph.results):
            name = self._unused(name or f"{name_of(node)}_bias")
            node.input[index] = name
        self.values[name] = np.ascontiguousarray(value)

    def _unused(self, name: str) -> str:
        found, number = name, 2
        while found in self.names:
            found, number = f"{name}_{number}", number + 1
        self.names.add(found)
        return found

    def _store(self, graph: onnx.GraphProto) -> None:
        used = {name for node in graph.node for name in (*node.input, *captured(node))}
        used |= {value.name for value in graph.output}
        for node in list(graph.node):
            mine = node.op_type == "Constant" and node.output[0]
            if mine and (node.output[0] in self.values or node.output[0] not in used):
                graph.node.remove(node)
        cut = {name for name in self.graph.users if name not in used}
        tensors = [t for t in graph.initializer if t.name not in self.values and t.name not in cut]
        tensors += [numpy_helper.from_array(value, name) for name, value in self.values.items()]
        del graph.initializer[:]
        graph.initializer.extend(tensors)
        # They state the shapes from before.
        del graph.value_info[:]
        for value in list(graph.input):
            if value.name in cut:
                graph.input.remove(value)
            elif value.name in self.values:
                kind = value.type.tensor_type.elem_type
                shape = self.values[value.name].shape
                value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))


def _folded(product: Product, inputs: Channels, gone: np.ndarray) -> np.ndarray | None:
    """Return what the inputs that go add to every output; None when that is nothing."""
    which = np.flatnonzero(gone & inputs.known & (inputs.values != 0))
    which = which[(product.rows[:, which] != 0).any(axis=(0, 2))]
    if not which.size:
        return None
    sums = product.rows[:, which].astype(np.float64).sum(axis=2)
    return product.scale * (sums @ inputs.values[which])


def _set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))
