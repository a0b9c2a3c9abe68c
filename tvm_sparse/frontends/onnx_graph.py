"""Rewrite an ONNX graph into what TVM's importer takes well, before it is imported."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..claims import claimed_zeros
from ..errors import ModelError
from .onnx_file import OnnxModel, densify, read_tensor
from .onnx_values import known_value, with_shapes

# The newest opset that needs no conversion; older models are brought up to it if onnx can do so.
_OPSET = 13

# Operators of other domains that the importer knows under their bare names.
_KNOWN_ELSEWHERE = {
    ("com.microsoft", "BiasGelu"),
    ("com.microsoft", "EmbedLayerNormalization"),
    ("com.microsoft", "FastGelu"),
    ("com.microsoft", "Gelu"),
    ("com.microsoft", "SkipLayerNormalization"),
}

# Operator -> operands that the importer reads while importing, though they may be floats.
_COMPILE_TIME = {
    "Clip": (1, 2),
    "Dropout": (1, 2),
    "NonMaxSuppression": (2, 3, 4),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}
# Larger float constants are weights even if a compile-time operand depends on them.
_COMPILE_TIME_SIZE = 1 << 10

# Operators between a weight and the layer whose weight it is.
_TRANSPARENT = {
    "Cast",
    "DequantizeLinear",
    "Expand",
    "Flatten",
    "Identity",
    "QuantizeLinear",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """List the graphs that a node holds: branches and loop bodies."""
    inner = [attr.g for attr in node.attribute if attr.HasField("g")]
    return inner + [graph for attr in node.attribute for graph in attr.graphs]


def node_label(node: onnx.NodeProto) -> str:
    """Return what a user knows a node by: its name, else its first output."""
    return node.name or next(iter(node.output), node.op_type)


def name_layers(model: OnnxModel) -> dict[str, str]:
    """Return the layer of every constant: the nodes that consume it, seen through casts etc."""
    consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in all_nodes(model.graph):
        for name in node.input:
            consumers[name].append(node)

    def labels(name: str, depth: int = 0) -> list[str]:
        found: list[str] = []
        for node in consumers[name]:
            if node.op_type in _TRANSPARENT and node.output and depth < 8:
                inner = labels(node.output[0], depth + 1)
                found.extend(inner or [node_label(node)])
            else:
                found.append(node_label(node))
        return found

    made = [out for node in model.graph.node if not any(node.input) for out in node.output]
    shaped = [n.output[0] for n in model.graph.node if n.op_type == "ConstantOfShape"]
    names = [*model.constants, *made, *shaped]
    return {name: ", ".join(dict.fromkeys(labels(name))) or name for name in names}


def settle_branches(model: OnnxModel) -> list[str]:
    """Take the branches whose conditions are known, and put the nodes of all others into the graph.

    An If that is left only chooses between results: TVM's importer would compute its branches in
    any case, up to the last operator of each.

    Returns
    -------
    list of str
        The labels of the nodes that branch at run time.
    """
    _collect_constants(model)
    _settle_optionals(model)
    _resolve_branches(model)
    return [node_label(node) for node in model.graph.node if node.op_type == "If"]


def simplify_graph(model: OnnxModel) -> None:
    """Rewrite `model` in place.

    Local functions are inlined, old opsets converted, constant nodes become constants, identities
    and dropout go, automatic padding becomes explicit, and scales of Gemm go into its weight.

    Raises
    ------
    ModelError
        When an operator is unknown to the importer.
    """
    _refuse_new_opset(model)
    if model.proto.functions:
        _inline(model)
    settle_branches(model)
    _drop_identities(model)
    _upgrade_opset(model)
    _collect_constants(model)
    _expand_missing(model)
    _collect_constants(model)
    _drop_identities(model)
    _explicit_padding(model)
    _scale_gemm(model)
    _split_clips(model)
    _drop_dead(model)


def opset_of(proto: onnx.ModelProto) -> int:
    """Return the version of the default operator set."""
    versions = [item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")]
    return versions[0] if versions else 1


def _refuse_new_opset(model: OnnxModel) -> None:
    newest = onnx.defs.onnx_opset_version()
    if opset_of(model.proto) > newest:
        raise ModelError(
            f"the model uses opset {opset_of(model.proto)}, but the installed onnx "
            f"{onnx.__version__} knows opsets up to {newest}; update onnx or export an older one"
        )


def _with_weight_inputs(model: OnnxModel) -> onnx.ModelProto:
    """Return a valid model in which the constants are inputs; small ones keep their values."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.ir_version = max(proto.ir_version, 8)
    for name, value in model.constants.items():
        if value.size <= _COMPILE_TIME_SIZE and value.dtype != object:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    return proto


def _take_over(model: OnnxModel, proto: onnx.ModelProto) -> None:
    """Use a transformed model, with its new initialisers as constants."""
    for tensor in proto.graph.initializer:
        model.constants[tensor.name] = read_tensor(tensor, None)
    del proto.graph.initializer[:]
    inputs = [value for value in proto.graph.input if value.name not in model.constants]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    model.proto = proto


def _inline(model: OnnxModel) -> None:
    import onnx.inliner

    try:
        _take_over(model, onnx.inliner.inline_local_functions(_with_weight_inputs(model)))
    except Exception as error:
        names = ", ".join(function.name for function in model.proto.functions)
        raise ModelError(f"the model's functions ({names}) cannot be inlined: {error}") from error


def _upgrade_opset(model: OnnxModel) -> None:
    if opset_of(model.proto) >= _OPSET:
        return
    from onnx import version_converter

    # Where onnx has no adapter the importer may still know the old form of the operator.
    with contextlib.suppress(Exception):
        _take_over(model, version_converter.convert_version(_with_weight_inputs(model), _OPSET))


def _expand_missing(model: OnnxModel) -> None:
    missing = _missing_operators(model)
    if not missing:
        return
    import onnx.inliner

    for node in missing:
        _write_defaults(node, opset_of(model.proto))
    ids = sorted({(node.domain, node.op_type) for node in missing})
    # Some operators are defined by others, and onnx can write them out; older ones cannot.
    with contextlib.suppress(Exception):
        expanded = onnx.inliner.inline_selected_functions(
            onnx.shape_inference.infer_shapes(_with_weight_inputs(model)),
            ids,
            inline_schema_functions=True,
        )
        _take_over(model, expanded)
    for node in _missing_operators(model):
        if node.op_type in ("Loop", "Scan") and not node.domain:
            raise ModelError(
                f"the node '{node_label(node)}' ({node.op_type}) repeats a part of the graph as "
                "often as is known at run time, which is not supported"
            )
        domain = f" of the domain '{node.domain}'" if node.domain else ""
        raise ModelError(
            f"the operator {node.op_type}{domain} (node '{node_label(node)}') is not supported"
        )


def _write_defaults(node: onnx.NodeProto, opset: int) -> None:
    """Write out attributes that are left at their default, which the inliner does not know."""
    with contextlib.suppress(Exception):
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        present = {attr.name for attr in node.attribute}
        for name, attr in schema.attributes.items():
            if name not in present and attr.default_value.name:
                node.attribute.append(attr.default_value)


def _missing_operators(model: OnnxModel) -> list[onnx.NodeProto]:
    from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

    known = set(_get_convert_map()) | {"Constant", "If"}
    missing = []
    for node in all_nodes(model.graph):
        standard = node.domain in ("", "ai.onnx") and node.op_type in known
        if not standard and (node.domain, node.op_type) not in _KNOWN_ELSEWHERE:
            missing.append(node)
    return missing


def _collect_constants(model: OnnxModel) -> None:
    """Turn Constant nodes, and ConstantOfShape of a constant, into constants."""
    kept = []
    for node in model.graph.node:
        value = _constant_value(model, node)
        if value is None:
            kept.append(node)
        else:
            model.constants[node.output[0]] = value
    replace_nodes(model.graph, kept)


def _constant_value(model: OnnxModel, node: onnx.NodeProto) -> np.ndarray | None:
    attrs = {attr.name: attr for attr in node.attribute}
    if node.op_type == "ConstantOfShape" and node.input[0] in model.constants:
        fill = read_tensor(attrs["value"].t, model.base) if "value" in attrs else np.zeros(1, "f4")
        return _filled(node, model.constants[node.input[0]], fill)
    if node.op_type != "Constant":
        return None
    if "value" in attrs:
        return read_tensor(attrs["value"].t, model.base)
    if "sparse_value" in attrs:
        return densify(attrs["sparse_value"].sparse_tensor, model.base)
    for name, dtype in (("value_float", "f4"), ("value_floats", "f4"), ("value_int", "i8")):
        if name in attrs:
            return np.array(helper.get_attribute_value(attrs[name]), dtype)
    if "value_ints" in attrs:
        return np.array(helper.get_attribute_value(attrs["value_ints"]), "i8")
    return None


def _filled(node: onnx.NodeProto, shape: np.ndarray, fill: np.ndarray) -> np.ndarray:
    label = node_label(node)
    if shape.ndim != 1 or shape.dtype.kind not in "iu" or fill.size != 1:
        raise ModelError(f"the node '{label}' (ConstantOfShape) has no shape, or no single value")
    try:
        result = claimed_zeros(shape.tolist(), fill.dtype)
    except ValueError as error:
        raise ModelError(f"the node '{label}' (ConstantOfShape) cannot be: {error}") from None
    result[...] = fill.reshape(-1)[0]
    return result


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Keep these nodes of a graph, in this order; others than its own are copied in."""
    kept = list(nodes)
    if len(kept) == len(graph.node):
        return
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)


def _settle_optionals(model: OnnxModel) -> None:
    """Resolve optional values: all are known, since optional inputs are given (`tensor_input`)."""
    empty = {""}
    kept = []
    for node in model.graph.node:
        given = next(iter(node.input), "")
        if node.op_type == "OptionalHasElement":
            model.constants[node.output[0]] = np.array(given not in empty)
            continue
        if node.op_type == "Optional" and given in empty:
            empty.add(node.output[0])
        elif node.op_type in ("Optional", "OptionalGetElement") and given not in empty:
            node.op_type = "Identity"
            del node.attribute[:]
        kept.append(node)
    replace_nodes(model.graph, kept)


def _resolve_branches(model: OnnxModel) -> None:
    """Replace an If with a known condition by the branch that it takes, others by a choice."""
    # One at a time: the condition of the next one may depend on what this one becomes.
    while (node := next(filter(_is_unsettled, model.graph.node), None)) is not None:
        condition = model.constants.get(node.input[0])
        if condition is None:
            condition = known_value(_with_weight_inputs(model), node.input[0])
        if condition is None:
            parts = _choose(model, node)
        else:
            if condition.size != 1:
                raise ModelError(f"the condition of '{node_label(node)}' (If) is no single value")
            wanted = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
            results, inner = _unpack_branch(model, node, wanted)
            parts = [*inner, *_identities(results, node.output)]
        nodes = [new for old in model.graph.node for new in (parts if old is node else [old])]
        copies = [onnx.NodeProto.FromString(item.SerializeToString()) for item in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)
        _collect_constants(model)
        _settle_optionals(model)


def _is_unsettled(node: onnx.NodeProto) -> bool:
    return node.op_type == "If" and node.input[0] != _condition_of(node)


def _condition_of(node: onnx.NodeProto) -> str:
    """Name the condition of an If that only chooses."""
    return f"{node.output[0]}/condition"


def _choose(model: OnnxModel, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Compute both branches in the graph itself, and let the If choose."""
    nodes: list[onnx.NodeProto] = []
    branches = {}
    for attr in node.attribute:
        results, inner = _unpack_branch(model, node, attr.name)
        nodes.extend(inner)
        names = [f"{name}/{attr.name}" for name in node.output]
        values = [helper.make_empty_tensor_value_info(name) for name in names]
        branches[attr.name] = helper.make_graph(
            _identities(results, names), f"{node_label(node)}/{attr.name}", [], values
        )
    # The condition may be a tensor of one element.
    shape = f"{node.output[0]}/shape"
    model.constants[shape] = np.array([], np.int64)
    condition = helper.make_node("Reshape", [node.input[0], shape], [_condition_of(node)])
    choice = helper.make_node("If", condition.output, node.output, name=node.name, **branches)
    return [*nodes, condition, choice]


def _identities(sources: Iterable[str], names: Iterable[str]) -> list[onnx.NodeProto]:
    pairs = zip(sources, names, strict=True)
    return [helper.make_node("Identity", [source], [name]) for source, name in pairs]


def _unpack_branch(
    model: OnnxModel, node: onnx.NodeProto, which: str
) -> tuple[list[str], list[onnx.NodeProto]]:
    """Give the results and the nodes of a branch names of their own, and keep its constants."""
    branch = next(attr.g for attr in node.attribute if attr.name == which)
    prefix = f"{node.output[0]}/{which}/"
    renames = {name: prefix + name for name in _names_of(branch)}
    for tensor in branch.initializer:
        model.constants[renames[tensor.name]] = read_tensor(tensor, model.base)
    for sparse in branch.sparse_initializer:
        model.constants[renames[sparse.values.name]] = densify(sparse, model.base)
    for item in branch.node:
        _rename_in_node(item, renames)
    if len(branch.output) != len(node.output):
        raise ModelError(
            f"the {which} of '{node_label(node)}' (If) has {len(branch.output)} results for "
            f"{len(node.output)}"
        )
    return [renames.get(value.name, value.name) for value in branch.output], list(branch.node)


def rename_values(graph: onnx.GraphProto, renames: Mapping[str, str]) -> None:
    """Rename values everywhere in a graph, inner graphs included."""
    for node in graph.node:
        _rename_in_node(node, renames)
    for value in [*graph.input, *graph.output]:
        value.name = renames.get(value.name, value.name)


def _rename_in_node(node: onnx.NodeProto, renames: Mapping[str, str]) -> None:
    for names in (node.input, node.output):
        for index, name in enumerate(names):
            if name in renames:
                names[index] = renames[name]
    for inner in subgraphs(node):
        # What a graph calls so itself is another value.
        own = _names_of(inner)
        rename_values(inner, {old: new for old, new in renames.items() if old not in own})


def _names_of(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the values that a graph makes or holds itself."""
    stored = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
    computed = {name for node in graph.node for name in node.output if name}
    return computed | {item.name for item in (*graph.input, *stored)}


def _drop_identities(model: OnnxModel) -> None:
    outputs = {value.name for value in model.graph.output}
    read = {name for node in all_nodes(model.graph) for name in node.input} | outputs
    renames: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        _rename_in_node(node, renames)
        mask_is_read = len(node.output) > 1 and node.output[1] in read
        if node.op_type == "Identity" or (node.op_type == "Dropout" and not mask_is_read):
            if _trains(model, node):
                raise ModelError(f"the node '{node_label(node)}' is a Dropout in training mode")
            if node.output[0] in outputs:
                node.op_type = "Identity"
                del node.input[1:], node.output[1:], node.attribute[:]
                kept.append(node)
            else:
                renames[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    replace_nodes(model.graph, kept)


def _trains(model: OnnxModel, node: onnx.NodeProto) -> bool:
    if node.op_type != "Dropout" or len(node.input) < 3:
        return False
    flag = model.constants.get(node.input[2])
    return flag is not None and bool(np.any(flag))


def _drop_dead(model: OnnxModel) -> None:
    live = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in live for name in node.output):
            kept.append(node)
            live.update(node.input)
            live.update(name for g in subgraphs(node) for n in all_nodes(g) for name in n.input)
    replace_nodes(model.graph, kept[::-1])
    model.constants = {name: v for name, v in model.constants.items() if name in live}


def _explicit_padding(model: OnnxModel) -> None:
    """Write automatic padding out: the importer makes a padded copy of the input for it."""
    nodes = [node for node in model.graph.node if _auto_pad(node).startswith("SAME")]
    if not nodes:
        return
    inferred = with_shapes(_with_weight_inputs(model))
    values = [*inferred.graph.value_info, *inferred.graph.input]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    for node in nodes:
        pads = _same_padding(model, node, shapes.get(node.input[0], []))
        if pads is not None:
            kept = [attr for attr in node.attribute if attr.name not in ("auto_pad", "pads")]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def _auto_pad(node: onnx.NodeProto) -> str:
    if node.op_type not in ("Conv", "MaxPool", "AveragePool"):
        return ""
    return next((a.s.decode(errors="replace") for a in node.attribute if a.name == "auto_pad"), "")


def _same_padding(model: OnnxModel, node: onnx.NodeProto, shape: list[int]) -> list[int] | None:
    attrs = {attr.name: helper.get_attribute_value(attr) for attr in node.attribute}
    kernel = attrs.get("kernel_shape")
    if kernel is None and node.op_type == "Conv" and node.input[1] in model.constants:
        kernel = model.constants[node.input[1]].shape[2:]
    if kernel is None:
        return None
    rank = len(kernel)
    strides, dilations = attrs.get("strides", [1] * rank), attrs.get("dilations", [1] * rank)
    if not len(strides) == len(dilations) == rank or min([*kernel, *strides, *dilations]) < 1:
        raise ModelError(f"the node '{node_label(node)}' ({node.op_type}) has no such windows")
    sizes = shape[2:] if len(shape) == rank + 2 else [0] * rank
    begin, end = [], []
    for taps, stride, dilation, size in zip(kernel, strides, dilations, sizes, strict=True):
        if size == 0 and stride != 1:
            return None
        steps = -(-size // stride) if size else 0
        reach = (taps - 1) * dilation
        total = max((steps - 1) * stride + reach + 1 - size, 0) if size else reach
        less, more = total // 2, total - total // 2
        begin.append(less if attrs["auto_pad"] == b"SAME_UPPER" else more)
        end.append(more if attrs["auto_pad"] == b"SAME_UPPER" else less)
    return [*begin, *end]


def _scale_gemm(model: OnnxModel) -> None:
    """Put alpha into a constant B and beta into a constant C, rounded once."""
    for node in model.graph.node:
        if node.op_type != "Gemm":
            continue
        for attribute, index in (("alpha", 1), ("beta", 2)):
            _scale_operand(model, node, attribute, index)


def _scale_operand(model: OnnxModel, node: onnx.NodeProto, attribute: str, index: int) -> None:
    found = next((attr for attr in node.attribute if attr.name == attribute), None)
    name = node.input[index] if len(node.input) > index else ""
    if found is None or found.f == 1.0 or name not in model.constants:
        return
    value = model.constants[name]
    if not is_weight(value):
        return
    scaled = f"{name}/{attribute}={found.f:g}"
    model.constants[scaled] = (value.astype(np.float64) * found.f).astype(value.dtype)
    node.input[index] = scaled
    node.attribute.remove(found)


def _split_clips(model: OnnxModel) -> None:
    """Write a Clip between constants as Max and Min.

    The importer turns Clip into functions of its own that ask the bounds whether they are NaN;
    nothing can be fused with those.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        bounds = [name for name in node.input[1:] if name]
        known = [model.constants.get(name) for name in bounds]
        if node.op_type != "Clip" or not bounds or not all(_is_finite(value) for value in known):
            nodes.append(node)
            continue
        value = node.input[0]
        steps = [("Max", 1), ("Min", 2)]
        steps = [(op, i) for op, i in steps if len(node.input) > i and node.input[i]]
        for op, index in steps:
            last = index == steps[-1][1]
            result = node.output[0] if last else f"{node.output[0]}/{op}"
            name = f"{node.name}/{op}" if node.name else ""
            nodes.append(helper.make_node(op, [value, node.input[index]], [result], name=name))
            value = result
    replace_nodes(model.graph, nodes)


def _is_finite(value: np.ndarray | None) -> bool:
    return value is not None and value.size == 1 and not np.isnan(value).any()


def compile_time_constants(model: OnnxModel) -> set[str]:
    """Return the constants that the importer has to see as values, not as parameters."""
    producers = {name: node for node in model.graph.node for name in node.output}
    wanted = [
        name
        for node in all_nodes(model.graph)
        for index, name in enumerate(node.input)
        if index in _COMPILE_TIME.get(node.op_type, ())
    ]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        node = producers.get(name)
        # The size of an activation is known without the weights that computed it.
        if node is not None and node.op_type not in ("Shape", "Size"):
            wanted.extend(node.input)
    return {
        name
        for name, value in model.constants.items()
        # The importer takes an input's size of 0 for one that is not known.
        if not (is_weight(value) and value.size)
        or (name in seen and value.size <= _COMPILE_TIME_SIZE)
    }


def is_weight(value: np.ndarray) -> bool:
    """Say whether a constant is a floating-point array of one dimension or more."""
    return value.ndim >= 1 and str(value.dtype).startswith(("float", "bfloat"))


def identifier(name: str, taken: set[str]) -> str:
    """Make a name that Relax prints as it is and that nothing else has; it joins `taken`."""
    plain = re.sub(r"\W", "_", name.removeprefix("onnx::"), flags=re.ASCII)
    plain = plain if plain[:1].isalpha() or plain[:1] == "_" else f"v_{plain}"
    fresh, count = plain, 1
    while fresh in taken:
        fresh, count = f"{plain}_{count}", count + 1
    taken.add(fresh)
    return fresh


def tensor_input(value: onnx.ValueInfoProto) -> Any:
    """Return the tensor type of a graph input; an optional tensor becomes a tensor.

    Raises
    ------
    ModelError
        When it is a sequence or a map.
    """
    optional = value.type.optional_type.elem_type
    if value.type.HasField("optional_type") and optional.HasField("tensor_type"):
        # A call gives every input, so that an optional one is there.
        value.type.CopyFrom(onnx.TypeProto.FromString(optional.SerializeToString()))
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"the input '{value.name}' is not a tensor")
    return value.type.tensor_type
