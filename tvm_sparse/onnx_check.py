"""What the front ends rely on in an ONNX model, checked before they walk through it.

Less than `onnx.checker` wants, which also refuses much that exporters write and that works; more
than protobuf promises, for which any field may be missing and any number may stand in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import onnx

from .claims import check_claim
from .errors import ModelError

# Graphs within graphs, and functions that call functions: what onnx itself walks by recursion.
_DEEPEST = 30


@dataclass(frozen=True)
class _Signature:
    """What a node of an operator must have.

    Attributes
    ----------
    needed : tuple of bool
        For each of the inputs that are counted, whether it may not be left out.
    attributes : mapping of str to int
        The type of each attribute, by `AttributeProto.AttributeType`.
    """

    needed: tuple[bool, ...] = ()
    outputs: int = 1
    attributes: Any = None
    required: tuple[str, ...] = ()


def check_model(proto: onnx.ModelProto, title: str) -> None:
    """Refuse a model whose graph is not one.

    Parameters
    ----------
    title : str
        What messages call it.

    Raises
    ------
    ModelError
        When a node lacks operands, results or attributes, or reads what nothing computes before it;
        when two nodes compute the same value; when a name is no text; when functions call
        themselves.
    """
    opsets = {item.domain: item.version for item in proto.opset_import}
    _Checker(title, opsets).check(proto.graph, set(), 0)
    _check_functions(proto, title)


class _Checker:
    def __init__(self, title: str, opsets: dict[str, int]) -> None:
        self.title, self.opsets = title, opsets

    def check(self, graph: onnx.GraphProto, outer: set[str], depth: int) -> None:
        """Check a graph inside others, whose values it may read."""
        if depth > _DEEPEST:
            raise ModelError(f"{self.title} has graphs within graphs, {depth} deep")
        stored = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
        values = [value.name for value in (*graph.input, *graph.output, *stored)]
        self._check_texts(values)
        defined = {"", *outer, *(item.name for item in (*graph.input, *stored))}
        computed: set[str] = set()
        for node in graph.node:
            self._check_node(node)
            for name in node.input:
                if name not in defined:
                    raise ModelError(
                        f"the node '{_label(node)}' reads '{name}', which nothing computes first"
                    )
            for inner in _subgraphs(node):
                self.check(inner, defined, depth + 1)
            for name in filter(None, node.output):
                if name in computed:
                    raise ModelError(f"two nodes of {self.title} compute '{name}'")
                computed.add(name)
            defined.update(node.output)
        for value in graph.output:
            if value.name not in defined:
                raise ModelError(f"nothing computes the output '{value.name}'")

    def _check_node(self, node: onnx.NodeProto) -> None:
        self._check_texts((node.name, node.op_type, node.domain, *node.input, *node.output))
        self._check_texts(attribute.name for attribute in node.attribute)
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self.opsets.get(domain, self.opsets.get(node.domain, 1))
        signature = _signature(node.op_type, version, domain)
        if len(node.output) < signature.outputs:
            raise ModelError(f"the node '{_label(node)}' ({node.op_type}) has no result")
        for index, needed in enumerate(signature.needed):
            if index >= len(node.input) or (needed and not node.input[index]):
                raise ModelError(f"the node '{_label(node)}' ({node.op_type}) lacks an operand")
        if any(attribute.ref_attr_name for attribute in node.attribute):
            raise ModelError(
                f"the node '{_label(node)}' ({node.op_type}) takes an attribute from a function "
                "around it, and there is none"
            )
        types = {attribute.name: attribute.type for attribute in node.attribute}
        for name in signature.required:
            if name not in types:
                raise ModelError(
                    f"the node '{_label(node)}' ({node.op_type}) lacks the attribute '{name}'"
                )
        for name, kind in types.items():
            if kind == onnx.AttributeProto.UNDEFINED or kind != signature.attributes.get(
                name, kind
            ):
                raise ModelError(
                    f"the attribute '{name}' of the node '{_label(node)}' ({node.op_type}) has a "
                    "value of the wrong kind"
                )

    def _check_texts(self, texts: Iterable[Any]) -> None:
        # What is no UTF-8 comes as bytes.
        if not all(isinstance(text, str) for text in texts):
            raise ModelError(f"{self.title} has a name that is not UTF-8")


@lru_cache(maxsize=512)
def _signature(operator: str, version: int, domain: str) -> _Signature:
    if not 0 < version < 1 << 31:
        return _Signature(attributes={})
    try:
        schema: Any = onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        # An operator of another domain, or one that is unknown: the importer will say so.
        return _Signature(attributes={})
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    return _Signature(
        # A variadic input is declared once, and may have to come several times.
        tuple(
            index >= len(schema.inputs) or schema.inputs[index].option == single
            for index in range(schema.min_input)
        ),
        max(schema.min_output, 1),
        {name: int(item.type) for name, item in schema.attributes.items()},
        tuple(name for name, item in schema.attributes.items() if item.required),
    )


def _label(node: onnx.NodeProto) -> str:
    return node.name or next(iter(node.output), node.op_type)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_functions(proto: onnx.ModelProto, title: str) -> None:
    """Refuse functions that call themselves: onnx would write them out without end."""
    left = {(item.domain, item.name): _called(item.node) for item in proto.functions}
    for _ in range(_DEEPEST):
        # Those that call none of the others, again and again.
        left = {name: calls for name, calls in left.items() if calls & left.keys()}
    if left:
        name = next(iter(left))[1]
        raise ModelError(f"the function '{name}' of {title} calls itself, or calls too deep")


def _called(nodes: Iterable[onnx.NodeProto]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for node in nodes:
        found.add((node.domain, node.op_type))
        for inner in _subgraphs(node):
            found |= _called(inner.node)
    return found


def check_tensors(proto: onnx.ModelProto) -> None:
    """Refuse weights that do not hold what they declare, in a model that has all its data.

    Raises
    ------
    ModelError
        As `check_tensor` does.
    """
    for graph in _all_graphs(proto.graph, 0):
        for tensor in graph.initializer:
            check_tensor(tensor)
        for sparse in graph.sparse_initializer:
            check_tensor(sparse.values)
            check_tensor(sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    check_tensor(attribute.t)


def _all_graphs(graph: onnx.GraphProto, depth: int) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node) if depth < _DEEPEST else ():
            yield from _all_graphs(inner, depth + 1)


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Refuse a tensor of an unknown type, of a shape that cannot be, or of too few or many bytes.

    Raises
    ------
    ModelError
        With its name.
    """
    dtype = numpy_type(tensor.data_type, f"the tensor '{tensor.name}'")
    try:
        check_claim(tensor.dims, 1 if dtype.hasobject else dtype.itemsize)
    except ValueError as error:
        raise ModelError(f"the tensor '{tensor.name}' cannot be: {error}") from None
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    wanted = math.prod(tensor.dims)
    if tensor.HasField("segment"):
        fits = False
    elif tensor.HasField("raw_data") and tensor.data_type not in _SMALLER_THAN_A_BYTE:
        fits = len(tensor.raw_data) == wanted * dtype.itemsize and not dtype.hasobject
    else:
        fits = _can_be_read(tensor)
    if not fits:
        raise ModelError(
            f"the initialiser '{tensor.name}' does not hold the {list(tensor.dims)} elements that "
            "it declares; the file is damaged"
        )


# Several of them stand in a byte, in ways that onnx itself knows best.
_SMALLER_THAN_A_BYTE = frozenset(
    number
    for name, number in onnx.TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
)


def _can_be_read(tensor: onnx.TensorProto) -> bool:
    try:
        onnx.numpy_helper.to_array(tensor)
    except Exception:
        # Whatever its own conversions raise.
        return False
    return True


def numpy_type(kind: int, what: str) -> Any:
    """Return NumPy's type of one of ONNX's.

    Raises
    ------
    ModelError
        When there is none of that number.
    """
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(kind)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{what} has an element type that is not known ({kind})") from None
