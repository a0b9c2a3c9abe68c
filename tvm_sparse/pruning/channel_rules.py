"""How channels pass through the operators of ONNX, one rule an operator.

A rule returns an empty string when it knows what becomes of the channels of the node's inputs, and
otherwise the reason why it does not; they all stay then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from .channel_graph import ChannelGraph, Channels, Dim, Product, Resize, Slice, captured, name_of
from .onnx_weights import FLOATS, attribute_of

Rule = Callable[[ChannelGraph, onnx.NodeProto], str]

_SHARED = "its weight serves other nodes too"
_NO_CONSTANT = "its weight or bias is no constant of the file"


def follow(graph: ChannelGraph) -> None:
    """Go through all nodes of a graph, which ONNX keeps in the order of their use."""
    for node in graph.model.graph.node:
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            reason = "what becomes of channels there is not known"
        else:
            reason = rule(graph, node)
        if reason:
            for name in (*node.input, *captured(node)):
                if name in graph.channels:
                    what = f"they reach the {node.op_type} '{name_of(node)}': {reason}"
                    graph.keep(graph.channels[name].ids, what)
    for name in graph.results & set(graph.channels):
        graph.keep(graph.channels[name].ids, "they are part of an output of the model")


# ---------------------------------------------------------------------------------------------
# Layers with weights
# ---------------------------------------------------------------------------------------------


def _conv(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    weight, bias = graph.constant(node.input[1]), _optional(graph, node, 2)
    if weight is None or bias is False:
        return _NO_CONSTANT
    if len(graph.users[node.input[1]]) > 1:
        return _SHARED
    data = graph.channels.get(node.input[0])
    if data is not None and data.axis != 1:
        return "its channels lie along another axis"
    rows = weight.reshape(*weight.shape[:2], math.prod(weight.shape[2:]))
    groups = attribute_of(node, "group", 1)
    if groups == 1:
        return _product(graph, node, rows, (0, 1), 1, data, bias, padded=_is_padded(node, weight))
    if rows.shape[1] > 1:
        return "it is a grouped convolution"
    if data is None:
        return ""
    if groups != len(data):
        return "its weight does not fit its input"
    return _depthwise(graph, node, rows, data, bias, _is_padded(node, weight))


def _depthwise(
    graph: ChannelGraph,
    node: onnx.NodeProto,
    rows: np.ndarray,
    data: Channels,
    bias: np.ndarray | None,
    padded: bool,
) -> str:
    times = rows.shape[0] // len(data)
    ids, values = np.repeat(data.ids, times), np.repeat(data.values, times)
    if padded:
        values = np.where(values == 0, 0.0, np.nan)
    sums = rows[:, 0].astype(np.float64).sum(axis=1)
    alive = (rows[:, 0] != 0).any(axis=1)
    added = np.zeros(len(ids)) if bias is None else bias
    with np.errstate(invalid="ignore"):
        outputs = np.where(alive, values * sums, 0.0) + added
    graph.channels[node.output[0]] = Channels(1, ids, outputs)
    graph.slices.append(Slice(node, 1, 0, ids))
    if bias is not None:
        graph.slices.append(Slice(node, 2, 0, ids))
    graph.resizes.append(Resize(node, data.ids, attribute="group"))
    return ""


def _gemm(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    weight = graph.constant(node.input[1])
    if weight is None or weight.ndim != 2 or attribute_of(node, "transA", 0):
        return _NO_CONSTANT
    if len(graph.users[node.input[1]]) > 1:
        return _SHARED
    axes = (0, 1) if attribute_of(node, "transB", 0) else (1, 0)
    rows = weight.transpose(axes)[:, :, None]
    added = _optional(graph, node, 2)
    if added is False or (added is not None and not _is_vector(added, rows.shape[0])):
        return _NO_CONSTANT
    beta = float(attribute_of(node, "beta", 1.0))
    bias = None
    if added is not None:
        bias = np.broadcast_to(beta * np.asarray(added).reshape(-1), rows.shape[:1])
    scale = float(attribute_of(node, "alpha", 1.0))
    data = graph.channels.get(node.input[0])
    return _product(graph, node, rows, axes, 1, data, bias, scale=scale, beta=beta)


def _matmul(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    weight, shape = graph.constant(node.input[1]), graph.shape(node.output[0])
    if weight is None or weight.ndim != 2:
        return _NO_CONSTANT
    if len(graph.users[node.input[1]]) > 1:
        return _SHARED
    if shape is None:
        return "the shape of its result is not known"
    data = graph.channels.get(node.input[0])
    if data is not None and data.axis != len(shape) - 1:
        return "its features lie along another axis"
    rows = weight.T[:, :, None]
    return _product(graph, node, rows, (1, 0), len(shape) - 1, data, None)


def _product(
    graph: ChannelGraph,
    node: onnx.NodeProto,
    rows: np.ndarray,
    axes: tuple[int, int],
    axis: int,
    data: Channels | None,
    bias: np.ndarray | None,
    padded: bool = False,
    scale: float = 1.0,
    beta: float = 1.0,
) -> str:
    used = (rows != 0).any(axis=2)
    if data is not None and len(data) != used.shape[1]:
        return "its weight does not fit its input"
    values = np.zeros(used.shape[0]) if bias is None else np.array(bias, np.float64)
    if data is None:
        values[used.any(axis=1)] = np.nan
    else:
        foldable = data.values == 0 if padded else data.known
        if padded:
            _keep_padded(graph, node, data, used.any(axis=0))
        _keep_read(graph, node, data, used.any(axis=0) & ~data.known)
        folded = np.flatnonzero(foldable & (data.values != 0) & used.any(axis=0))
        sums = rows[:, folded].astype(np.float64).sum(axis=2)
        values += scale * (sums @ data.values[folded])
        values[used[:, ~foldable].any(axis=1)] = np.nan
    outputs = Channels(axis, graph.fresh(used.shape[0]), values)
    graph.channels[node.output[0]] = outputs
    graph.products.append(Product(node, rows, *axes, outputs, data, bias, scale, beta))
    return ""


def _keep_read(
    graph: ChannelGraph, node: onnx.NodeProto, data: Channels, which: np.ndarray
) -> None:
    reason = f"'{name_of(node)}' reads them, and they are not constant there"
    graph.keep(data.ids[which], reason)


def _keep_padded(
    graph: ChannelGraph, node: onnx.NodeProto, data: Channels, used: np.ndarray
) -> None:
    which = used & data.known & (data.values != 0)
    reason = (
        f"their constant is not zero, and meets the zeros around the input of '{name_of(node)}'"
    )
    graph.keep(data.ids[which], reason)


def _is_padded(node: onnx.NodeProto, weight: np.ndarray) -> bool:
    if attribute_of(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return max(weight.shape[2:], default=1) > 1
    return any(attribute_of(node, "pads", ()))


def _optional(graph: ChannelGraph, node: onnx.NodeProto, index: int) -> Any:
    """Return an optional constant in float64; None when left out, False when it is computed."""
    if len(node.input) <= index or not node.input[index]:
        return None
    value = graph.constant(node.input[index])
    return False if value is None else value.astype(np.float64)


def _is_vector(value: np.ndarray, size: int) -> bool:
    return value.size in (1, size) and value.shape[-1:] in ((), (1,), (value.size,))


# ---------------------------------------------------------------------------------------------
# Channel by channel
# ---------------------------------------------------------------------------------------------


def _batch_norm(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    constants = [graph.constant(name) for name in node.input[1:5]]
    if any(value is None for value in constants) or attribute_of(node, "training_mode", 0):
        return "its statistics are no constants of the file"
    if data.axis != 1 or any(name in graph.users for name in node.output[1:] if name):
        return "its channels lie along another axis"
    scale, shift, mean, variance = (np.asarray(v, np.float64) for v in constants)
    epsilon = attribute_of(node, "epsilon", 1e-5)
    with np.errstate(invalid="ignore"):
        values = scale * (data.values - mean) / np.sqrt(variance + epsilon) + shift
    graph.channels[node.output[0]] = Channels(1, data.ids, np.where(scale == 0, shift, values))
    graph.slices += [Slice(node, index, 0, data.ids) for index in range(1, 5)]
    return ""


def _elementwise(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    followed = {i: graph.channels[n] for i, n in enumerate(node.input) if n in graph.channels}
    if not followed:
        return ""
    if any(name in graph.users or name in graph.results for name in node.output[1:] if name):
        return "its second result is used"
    ranks = {i: graph.shape(name) for i, name in enumerate(node.input) if name}
    if any(shape is None for shape in ranks.values()):
        return "the shape of an operand is not known"
    rank = max(len(shape) for shape in ranks.values() if shape is not None)
    # Operands are aligned at their last axes.
    sides = {c.axis - len(ranks[i] or ()) for i, c in followed.items()}
    count = max(len(c) for c in followed.values())
    if len(sides) > 1 or any(len(c) != count for c in followed.values()):
        return "the channels of its operands lie differently"
    side = sides.pop()
    sliced = []
    for index, shape in ranks.items():
        size = _size(shape or (), side)
        if index in followed or size == 1:
            continue
        if not graph.is_constant(node.input[index]) or size != count:
            return f"'{node.input[index]}' cannot be followed"
        sliced.append(Slice(node, index, side, next(iter(followed.values())).ids))
    first, *others = followed.values()
    for other in others:
        graph.bind(first.ids, other.ids)
    graph.slices += sliced
    values = _evaluate(graph, node, followed, side, count)
    graph.channels[node.output[0]] = Channels(rank + side, first.ids, values)
    return ""


def _size(shape: tuple[Dim, ...], side: int) -> Dim:
    """Return the size along an axis counted from the last; 1 where there is none."""
    return shape[side] if len(shape) >= -side else 1


def _evaluate(
    graph: ChannelGraph,
    node: onnx.NodeProto,
    followed: dict[int, Channels],
    side: int,
    count: int,
) -> np.ndarray:
    """Tell what constant channels become; NaN for those that do not stay constant."""
    operands: list[np.ndarray | None] = []
    known = np.ones(count, bool)
    zero = np.zeros(count, bool)
    for index, name in enumerate(node.input):
        operand = None
        if index in followed:
            channels = followed[index]
            known &= channels.known
            zero |= channels.values == 0
            operand = np.where(channels.known, channels.values, 1.0).reshape(
                (-1,) + (1,) * (-side - 1)
            )
        elif name:
            operand = graph.constant(name)
            if operand is None:
                known[:] = False
                operand = np.ones(())
        operands.append(operand)
    values = np.full(count, np.nan)
    result = _run(graph.model, node, operands) if known.any() else None
    if result is not None and result.ndim >= -side and result.shape[side] == count:
        by_channel = np.moveaxis(result, side, 0).reshape(count, -1)
        same = (by_channel == by_channel[:, :1]).all(axis=1)
        values = np.where(known & same, by_channel[:, 0], np.nan)
    if node.op_type == "Mul":
        values[zero] = 0.0
    return values


def _run(
    model: onnx.ModelProto, node: onnx.NodeProto, operands: list[np.ndarray | None]
) -> np.ndarray | None:
    """Compute one node in float64, as ONNX's own reference defines it."""
    from onnx.reference import ReferenceEvaluator

    if node.op_type in ("Identity", "Dropout"):
        return operands[0]
    if node.op_type == "Cast":
        return operands[0] if attribute_of(node, "to", 0) in FLOATS else None
    feed = {}
    for index, operand in enumerate(operands):
        if operand is not None:
            is_int = operand.dtype.kind in "iub"
            feed[f"i{index}"] = operand if is_int else operand.astype(np.float64)
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.input[:], alone.output[:]
    alone.input.extend(f"i{i}" if operand is not None else "" for i, operand in enumerate(operands))
    alone.output.append("y")
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in feed.items()
    ]
    result = helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)
    small = helper.make_model(
        helper.make_graph([alone], "one", values, [result]), opset_imports=model.opset_import
    )
    try:
        with np.errstate(all="ignore"):
            results: Any = ReferenceEvaluator(small).run(None, feed)
            return np.asarray(results[0], np.float64)
    except Exception:
        # Whatever the reference lacks: the channels are then not constant as far as is known.
        return None


def _pool(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    if data.axis != 1 or any(name for name in node.output[1:]):
        return "its channels lie along another axis, or its indices are used"
    values = data.values
    if node.op_type == "AveragePool" and attribute_of(node, "count_include_pad", 0):
        # Zeros count around the input, so that only a zero stays what it is.
        values = np.where(values == 0, values, np.nan)
    graph.channels[node.output[0]] = Channels(1, data.ids, values)
    return ""


def _pad(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    pads = attribute_of(node, "pads", None)
    value: Any = attribute_of(node, "value", 0.0)
    if len(node.input) > 1:
        pads = graph.constant(node.input[1])
        value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
    shape = graph.shape(node.input[0])
    if pads is None or value is None or shape is None or len(pads) != 2 * len(shape):
        return "how much it pads is not known"
    if pads[data.axis] or pads[data.axis + len(shape)]:
        return "it pads channels"
    values = data.values
    if attribute_of(node, "mode", b"constant") == b"constant":
        values = np.where(values == float(np.asarray(value).reshape(())), values, np.nan)
    graph.channels[node.output[0]] = Channels(data.axis, data.ids, values)
    return ""


def _resample(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    index = 2 if len(node.input) > 2 else 1
    name = node.input[index] if len(node.input) > index else ""
    scales = graph.constant(name) if name else attribute_of(node, "scales", None)
    sizes = len(node.input) > 3 and node.input[3]
    if scales is None or sizes or not len(scales) or scales[data.axis] != 1:
        return "how it scales is not known"
    mode = attribute_of(node, "coordinate_transformation_mode", b"")
    if mode == b"tf_crop_and_resize" or attribute_of(node, "axes", None):
        return "how it scales is not known"
    graph.channels[node.output[0]] = data
    return ""


# ---------------------------------------------------------------------------------------------
# Where channels lie
# ---------------------------------------------------------------------------------------------


def _concat(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    if not any(name in graph.channels for name in node.input):
        return ""
    shape = graph.shape(node.output[0])
    if shape is None:
        return "the shape of its result is not known"
    axis = attribute_of(node, "axis", 0) % len(shape)
    parts = []
    for name in node.input:
        channels, part = graph.channels.get(name), graph.shape(name)
        if channels is not None and channels.axis != axis:
            return "it joins along another axis"
        size = part[axis] if part is not None else None
        if channels is None:
            if not isinstance(size, int):
                return f"'{name}' cannot be followed"
            channels = Channels(axis, graph.fresh(size), np.full(size, np.nan))
            graph.keep(channels.ids, f"'{name}' cannot be followed")
        parts.append(channels)
    ids = np.concatenate([part.ids for part in parts])
    values = np.concatenate([part.values for part in parts])
    graph.channels[node.output[0]] = Channels(axis, ids, values)
    return ""


def _reshape(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    place = None if before is None or after is None else _place(before, after, data.axis)
    if place is None or after is None:
        return "it mixes channels with other axes, or sizes that are not known"
    times = _known(after[place]) // len(data)
    ids, values = np.repeat(data.ids, times), np.repeat(data.values, times)
    if node.op_type == "Reshape":
        target = graph.constant(node.input[1])
        if target is None:
            return "its shape is computed"
        if target[place] > 0:
            graph.resizes.append(Resize(node, ids, position=place))
    graph.channels[node.output[0]] = Channels(place, ids, values)
    return ""


def _place(before: tuple[Dim, ...], after: tuple[Dim, ...], axis: int) -> int | None:
    """Find where channels lie in a new shape; None when they mix with axes before them."""
    tail = before[axis:]
    if not all(isinstance(size, int) for size in tail):
        return None
    total, count = math.prod(map(_known, tail)), _known(tail[0])
    for place in range(len(after)):
        rest = after[place:]
        if not all(isinstance(size, int) for size in rest):
            continue
        if math.prod(map(_known, rest)) != total:
            continue
        if rest[0] == count or (rest[0] == total and all(size == 1 for size in rest[1:])):
            return place
    return None


def _known(size: Dim) -> int:
    assert isinstance(size, int), "sizes are looked at before they are used"
    return size


def _transpose(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    shape = graph.shape(node.input[0])
    if shape is None:
        return "the shape of its input is not known"
    order = attribute_of(node, "perm", None) or list(range(len(shape)))[::-1]
    axis = list(order).index(data.axis)
    graph.channels[node.output[0]] = Channels(axis, data.ids, data.values)
    return ""


def _reaxis(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    """Squeeze, Unsqueeze and reductions: axes go or come, channels stay."""
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    before, after = graph.shape(node.input[0]), graph.shape(node.output[0])
    axes = attribute_of(node, "axes", None)
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = graph.constant(node.input[1])
    if before is None or after is None or axes is None:
        return "its axes are not known"
    longer = max(len(before), len(after))
    touched = {int(axis) % longer for axis in np.asarray(axes).reshape(-1)}
    if node.op_type == "Unsqueeze":
        axis = [place for place in range(longer) if place not in touched][data.axis]
    elif data.axis in touched:
        return "it reduces over channels"
    elif len(after) == len(before):
        axis = data.axis
    else:
        axis = data.axis - sum(place < data.axis for place in touched)
    values = data.values
    if node.op_type == "ReduceSum":
        values = np.where(values == 0, values, np.nan)
    graph.channels[node.output[0]] = Channels(axis, data.ids, values)
    return ""


def _shape_of(graph: ChannelGraph, node: onnx.NodeProto) -> str:
    """Let a Shape be whose every use looks at another axis than that of the channels."""
    data = graph.channels.get(node.input[0])
    if data is None:
        return ""
    for user in graph.users.get(node.output[0], ()):
        index = graph.constant(user.input[1]) if user.op_type == "Gather" else None
        rank = len(graph.shape(node.input[0]) or ())
        if index is None or not rank or (np.asarray(index) % rank == data.axis).any():
            return "their number is computed with"
    return "" if node.output[0] not in graph.results else "their number is an output"


def _constant(_graph: ChannelGraph, _node: onnx.NodeProto) -> str:
    return ""


_ELEMENTWISE = (
    "Abs Add Cast Ceil Celu Clip Cos Div Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish "
    "Identity LeakyRelu Log Max Mean Min Mish Mul Neg PRelu Pow Reciprocal Relu Round Selu Sigmoid "
    "Sign Sin Softplus Softsign Sqrt Sub Sum Tanh ThresholdedRelu"
).split()

RULES: dict[str, Rule] = {
    "Constant": _constant,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "AveragePool": _pool,
    "GlobalAveragePool": _pool,
    "GlobalMaxPool": _pool,
    "MaxPool": _pool,
    "Pad": _pad,
    "Resize": _resample,
    "Upsample": _resample,
    "Concat": _concat,
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "ReduceMax": _reaxis,
    "ReduceMean": _reaxis,
    "ReduceMin": _reaxis,
    "ReduceSum": _reaxis,
    "Squeeze": _reaxis,
    "Unsqueeze": _reaxis,
    "Shape": _shape_of,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
}
