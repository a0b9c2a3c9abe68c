"""ONNX models become a Model."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import ModelError
from ..model import Model, TensorSpec
from ..onnx_check import numpy_type
from ..passes.empty_branches import empty_branches
from ..passes.rewrite_main import main_of, with_main
from .onnx_file import OnnxModel, read_onnx
from .onnx_graph import (
    all_nodes,
    compile_time_constants,
    identifier,
    name_layers,
    node_label,
    opset_of,
    rename_values,
    settle_branches,
    simplify_graph,
    tensor_input,
)
from .onnx_masks import fold_masks
from .onnx_overlay import lay_over_graph, masked_notes
from .onnx_quantised import quantised_weights
from .relax import finish
from .shapes import solve_dimensions


def load_onnx(
    source: Any, *, shapes: Mapping[str, Sequence[int]] | None = None, weights: Any = None
) -> Model:
    """Make a `Model` of an ONNX file, the bytes of one, or a ModelProto (which is not changed).

    Layers are named by their ONNX nodes, else by what these compute. `weights` is as for `load`.

    Raises
    ------
    ModelError
        When it cannot be read, holds an operator that the importer lacks, or `shapes` does not fit.
    """
    model = read_onnx(source)
    inputs = _fix_inputs(model, shapes)
    branches = settle_branches(model)
    laid = _settle_weights(model, weights)
    layers = name_layers(model)
    outputs = [value.name for value in model.graph.output]
    quantised = quantised_weights(model.graph, model.constants)
    simplify_graph(model)
    symbols = _plain_dimensions(model)
    values, identifiers = _weights_to_inputs(model, len(inputs))
    mod = _import(model)
    _keep_layer_of_scaled(values, layers)
    loaded = Model(
        mod=mod,
        params={identifiers[name]: value for name, value in values.items()},
        layer_names={identifiers[name]: layers.get(name, name) for name in values},
        inputs=inputs,
        outputs=(),
        source=model.title,
        notes=(
            *laid,
            *(
                f"'{name}' branches at run time: both branches are computed, and one result is "
                "taken"
                for name in branches
            ),
            *(
                f"'{name}' keeps its quantised weight ({how}): sparse kernels take floating-point "
                "weights only"
                for name, how in quantised.items()
            ),
        ),
    )
    return finish(loaded, output_names=outputs, symbols=symbols)


def _settle_weights(model: OnnxModel, weights: Any) -> list[str]:
    """Multiply masks in, lay other weights over, and say so."""
    constants = model.constants
    folded = fold_masks(model.graph, model.proto.opset_import, constants, constants.__getitem__)
    constants.update(folded)
    notes = masked_notes(list(folded))
    if weights is not None:
        read = {name for node in all_nodes(model.graph) for name in node.input}
        used = {name: value for name, value in constants.items() if name in read}
        overlay = lay_over_graph(model.graph, used, weights)
        constants.update(overlay.values)
        notes += overlay.notes
    return notes


def _fix_inputs(
    model: OnnxModel, shapes: Mapping[str, Sequence[int]] | None
) -> tuple[TensorSpec, ...]:
    """Read the inputs, give nameless dimensions a name, and fix those that `shapes` gives."""
    specs = []
    for value in model.graph.input:
        tensor = tensor_input(value)
        if not tensor.HasField("shape"):
            rank = len((shapes or {}).get(value.name, ()))
            if not rank:
                raise ModelError(
                    f"the shape of input '{value.name}' is unknown; give one for it, for example "
                    f"{{'{value.name}': (1, 3, 224, 224)}}"
                )
            for _ in range(rank):
                tensor.shape.dim.add()
        specs.append(_read_input(value))
    solved = solve_dimensions(specs, shapes)
    return tuple(
        _apply(value, spec, solved) for value, spec in zip(model.graph.input, specs, strict=True)
    )


def _read_input(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            dims.append(int(dim.dim_value))
        else:
            # Some exporters write 0 or -1 where they mean any size.
            dims.append(dim.dim_param or f"{value.name}_dim{axis}")
    kind = tensor.elem_type or onnx.TensorProto.FLOAT
    dtype = str(numpy_type(kind, f"the input '{value.name}'"))
    return TensorSpec(value.name, tuple(dims), dtype)


def _apply(value: onnx.ValueInfoProto, spec: TensorSpec, solved: Mapping[str, int]) -> TensorSpec:
    dims = tuple(solved.get(d, d) if isinstance(d, str) else d for d in spec.shape)
    for proto, size in zip(value.type.tensor_type.shape.dim, dims, strict=True):
        if isinstance(size, int):
            proto.dim_value = size
        else:
            proto.dim_param = size
    return TensorSpec(spec.name, dims, spec.dtype)


def _plain_dimensions(model: OnnxModel) -> dict[str, str]:
    """Rename symbolic dimensions to identifiers, since ``batch-size`` would be a difference.

    Returns
    -------
    dict of str to str
        The user's name of each, by identifier.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param not in names:
                names[dim.dim_param] = identifier(dim.dim_param, taken)
            if dim.dim_param:
                dim.dim_param = names[dim.dim_param]
    return {plain: name for name, plain in names.items()}


def _weights_to_inputs(
    model: OnnxModel, input_count: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Hand weights over as graph inputs, so that their values never pass through the importer."""
    inline = compile_time_constants(model)
    weights = {name: value for name, value in model.constants.items() if name not in inline}
    graph = model.graph
    for name in sorted(inline):
        graph.initializer.append(numpy_helper.from_array(model.constants[name], name))
    for name, value in weights.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    taken = {name for node in all_nodes(graph) for name in node.output}
    renames = {value.name: identifier(value.name, taken) for value in graph.input}
    rename_values(graph, renames)
    model.constants = {}
    model.input_count = input_count
    return weights, renames


def _keep_layer_of_scaled(weights: Mapping[str, Any], layers: dict[str, str]) -> None:
    for name in weights:
        source = re.sub(r"/(alpha|beta)=[^/]*$", "", name)
        if name not in layers and source in layers:
            layers[name] = layers[source]


def _import(model: OnnxModel) -> Any:
    from tvm.relax.frontend.onnx import from_onnx

    model.proto.ir_version = max(model.proto.ir_version, 8)
    printed = io.StringIO()
    try:
        # The importer prints the operator that it failed on, and warns about names.
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            mod = from_onnx(model.proto, opset=opset_of(model.proto), sanitize_input_names=False)
    except Exception as error:
        raise ModelError(_explain(model, printed.getvalue(), error)) from error
    # The importer leaves the last operator of each branch where it was.
    mod = empty_branches(mod)
    return with_main(mod, main_of(mod).with_attr("num_input", model.input_count))


def _explain(model: OnnxModel, printed: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Some of its errors say nothing but a full stop.
    reason = next((line for line in lines[-1:] if len(line) > 1), type(error).__name__)
    found = re.search(r"Error converting operator (\w+)", printed)
    if found is None:
        return f"TVM cannot import this model: {reason}"
    nodes = [node_label(node) for node in all_nodes(model.graph) if node.op_type == found[1]]
    where = f"node '{nodes[0]}'" if len(nodes) == 1 else f"one of {len(nodes)} such nodes"
    return f"TVM cannot import the operator {found[1]} ({where}): {reason}"
