"""What is known of the channels of every tensor in an ONNX graph.

A channel of one tensor is bound to channels of others: an addition needs the same channels on both
sides, a depthwise convolution gives what it takes. Bound channels form a class, and a class is
removed as a whole or not at all. Beside its class a channel may have a value: the number that it
holds in every place, whatever the input of the model is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from ..errors import ModelError

Dim = int | str | None

# No constant of more elements says what shape something has.
_LARGEST_SHAPE = 64


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor.

    Attributes
    ----------
    axis : int
        Where they lie.
    ids : numpy.ndarray of int
        A member of the class of each.
    values : numpy.ndarray of float64
        What each holds everywhere; NaN where that is not known.
    """

    axis: int
    ids: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def known(self) -> np.ndarray:
        """Which of them are constant."""
        return np.isfinite(self.values)


@dataclass(frozen=True)
class Slice:
    """The constant `node.input[index]` has these channels along `axis`."""

    node: onnx.NodeProto
    index: int
    axis: int
    ids: np.ndarray


@dataclass(frozen=True)
class Product:
    """A layer with a weight: how its constants lie, and what its bias is.

    Attributes
    ----------
    node : onnx.NodeProto
        Its weight is ``input[1]``.
    rows : numpy.ndarray
        The weight as [outputs, inputs, taps], of its own type.
    row_axis, column_axis : int
        Outputs and inputs in the stored weight.
    outputs : Channels
        What it makes.
    inputs : Channels or None
        What it reads; None where that cannot be followed.
    scale, beta : float
        A Gemm's alpha, and what multiplies its bias.
    bias : numpy.ndarray of float64 or None
        Per output, as it is added.
    """

    node: onnx.NodeProto
    rows: np.ndarray
    row_axis: int
    column_axis: int
    outputs: Channels
    inputs: Channels | None
    bias: np.ndarray | None
    scale: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True)
class Resize:
    """An integer of a node that counts channels: its attribute, or an entry of its input 1."""

    node: onnx.NodeProto
    ids: np.ndarray
    attribute: str = ""
    position: int = 0


@dataclass
class ChannelGraph:
    """A graph while it is followed from its inputs to its outputs."""

    model: onnx.ModelProto
    channels: dict[str, Channels] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    resizes: list[Resize] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    parents: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = _shapes(self.model)
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._tensors.update(
            {
                node.output[0]: attribute.t
                for node in self.model.graph.node
                if node.op_type == "Constant"
                for attribute in node.attribute
                if attribute.name == "value"
            }
        )
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in (*node.input, *captured(node)):
                self.users.setdefault(name, []).append(node)
        self.results = {value.name for value in self.model.graph.output}

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant of the file, or None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def is_constant(self, name: str) -> bool:
        """Say whether a name stands for a constant of the file."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """Return the shape of a tensor, or None when not even its rank is known."""
        tensor = self._tensors.get(name)
        return self.shapes.get(name) if tensor is None else tuple(tensor.dims)

    def fresh(self, count: int) -> np.ndarray:
        """Make new classes."""
        start = len(self.parents)
        self.parents += range(start, start + count)
        return np.arange(start, start + count)

    def root(self, member: int) -> int:
        """Return the one that stands for a class."""
        while self.parents[member] != member:
            self.parents[member] = self.parents[self.parents[member]]
            member = self.parents[member]
        return member

    def bind(self, left: Iterable[int], right: Iterable[int]) -> None:
        """Let channels live and die together."""
        for a, b in zip(left, right, strict=True):
            self.parents[self.root(int(a))] = self.root(int(b))

    def keep(self, ids: Iterable[int], reason: str) -> None:
        """Have channels stay, and say why."""
        for member in ids:
            self.reasons.setdefault(int(member), reason)

    def reasons_by_class(self) -> dict[int, str]:
        """Why classes stay, by the one that stands for each."""
        found: dict[int, str] = {}
        for member, reason in self.reasons.items():
            found.setdefault(self.root(member), reason)
        return found


def name_of(node: onnx.NodeProto) -> str:
    """Return what a user calls a node."""
    return node.name or node.output[0]


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """List what the subgraphs of a node read, from inside and outside."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from captured(inner)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[Dim, ...]]:
    try:
        graph = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the shapes of this model cannot be inferred: {lines[0]}") from None
    found: dict[str, tuple[Dim, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(map(_size, dims))
    return found


# Every channel along an axis is kept track of, and a file may claim any number of them.
_LARGEST = 1 << 24


def _size(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value if 0 <= dim.dim_value <= _LARGEST else None
    return dim.dim_param or None


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy what the shapes follow from: inference is slow with large weights, and fails at 2 GiB.

    Shapes that the file states are left out: they may be those from before an earlier removal.
    """
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    tensors = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in tensors)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE:
            graph.initializer.append(tensor)
        else:
            kind = (tensor.data_type, tuple(tensor.dims))
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, *kind))
    return bare
