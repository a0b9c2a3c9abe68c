"""Real networks as ONNX models, built here and now: nothing is downloaded.

The structure is that of the published networks. The weights are drawn at random so that pruning
them gives what pruning trained weights gives (rows and columns of uneven density, whole kernels
empty), and so that activations keep a sane scale through the depth. Such models take as long to run
as trained ones; their answers mean nothing.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .dtypes import HALF_TYPES, numpy_dtype
from .errors import ModelError

Batch = int | str

LIGHT_MODELS: tuple[str, ...] = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)

# Sigma of the logarithm of the scales of rows, of columns, and of whole kernels: with these, pruned
# weights are as uneven as trained and pruned ones.
_MATRIX_SPREAD = (0.12, 0.16)
_CONV_SPREAD = (0.15, 0.15)
_KERNEL_SPREAD = 0.55

# How an operator changes the mean square of activations that are roughly normal (or half-normal,
# behind a ReLU).
_GAIN: Mapping[str, float] = {
    "Relu": 0.5,
    "Clip": 0.5,
    "MaxPool": 3.0,
    "AveragePool": 0.4,
    "GlobalAveragePool": 0.4,
}


def trained_like(
    rng: np.random.Generator, shape: Sequence[int], std: float, *, kernels: bool | None = None
) -> np.ndarray:
    """Draw weights whose magnitudes are spread as in a trained network.

    Parameters
    ----------
    shape : sequence of int
        Two dimensions (a matrix) or four (OIHW).
    std : float
        Standard deviation over the whole array.
    kernels : bool, optional
        Give each (output, input) kernel a scale of its own; by default where a kernel has more
        than one tap.

    Returns
    -------
    numpy.ndarray
        float32 of the given shape: Gaussian, with log-normal scales of rows, columns and kernels.
    """
    shape = tuple(int(size) for size in shape)
    taps = int(np.prod(shape[2:]))
    row_sigma, column_sigma = _MATRIX_SPREAD if taps == 1 else _CONV_SPREAD
    kernel_sigma = _KERNEL_SPREAD if (taps > 1 if kernels is None else kernels) else 0.0
    rest = (1,) * (len(shape) - 2)
    weights = rng.standard_normal(shape, dtype=np.float32)
    weights *= _lognormal(rng, (shape[0], 1, *rest), row_sigma)
    weights *= _lognormal(rng, (1, shape[1], *rest), column_sigma)
    if kernel_sigma:
        weights *= _lognormal(rng, (*shape[:2], *rest), kernel_sigma)
    # E[exp(2 s Z)] = exp(2 s^2) for each of the independent scales.
    weights *= np.float32(std / np.exp(row_sigma**2 + column_sigma**2 + kernel_sigma**2))
    return weights


def _lognormal(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    return np.exp(np.float32(sigma) * rng.standard_normal(shape, dtype=np.float32))


class _Initialiser:
    """Draws every weight of a graph, following the scale of the activations from node to node."""

    def __init__(
        self, nodes: Sequence[onnx.NodeProto], shapes: Mapping[str, tuple[int, ...]], seed: int
    ) -> None:
        self.nodes = nodes
        self.shapes = shapes
        self.seed = seed
        self.values: dict[str, np.ndarray] = {}
        self.square: dict[str, float] = {}
        self.alias: dict[str, str] = {}
        self.residual: set[str] = set()
        self.deviations: set[str] = set()

    def run(self) -> dict[str, np.ndarray]:
        """Return the value of each name in `shapes`."""
        for node in self.nodes:
            if node.op_type in ("Reshape", "Unsqueeze", "Transpose") and self._root(node.input[0]):
                self.alias[node.output[0]] = node.input[0]
                continue
            self.square[node.output[0]] = self._visit(node)
        for name, shape in self.shapes.items():
            if name not in self.values:
                small = self._rng(name).standard_normal(shape, dtype=np.float32)
                self.values[name] = np.float32(0.05) * small
        return self.values

    def _rng(self, name: str) -> np.random.Generator:
        """Draw each weight from its own stream, whatever else the graph holds."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _root(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name if name in self.shapes else ""

    def _uniform(self, name: str, low: float, high: float) -> None:
        root = self._root(name)
        if root and root not in self.values:
            self.values[root] = (
                self._rng(root).uniform(low, high, self.shapes[root]).astype(np.float32)
            )

    def _visit(self, node: onnx.NodeProto) -> float:
        known = [self.square.get(name, 1.0) for name in node.input if name and not self._root(name)]
        if node.op_type in ("Conv", "Gemm", "MatMul") and self._root(node.input[1]):
            return self._weigh(node, known[0])
        if node.op_type == "BatchNormalization":
            self._uniform(node.input[1], 0.8, 1.2)
            self._uniform(node.input[4], 0.5, 1.5)
            return 1.1 * known[0]
        if node.op_type == "LayerNormalization":
            self._uniform(node.input[1], 0.8, 1.2)
            return 1.0
        if node.op_type == "Mul":
            for name in node.input:
                self._uniform(name, 0.8, 1.2)
        if node.op_type == "Sqrt":
            self.deviations.add(node.output[0])
        if node.op_type == "Div" and node.input[1] in self.deviations:
            return 1.0
        if node.op_type in ("Sum", "Add"):
            if len(known) > 1:
                self.residual.add(node.output[0])
            return sum(known)
        if node.op_type == "Relu" and node.input[0] in self.residual:
            # One of the summands is mostly positive already, so the ReLU cuts little.
            return 0.85 * known[0]
        if node.op_type == "Concat":
            return sum(known) / len(known)
        return _GAIN.get(node.op_type, 1.0) * max(known, default=1.0)

    def _weigh(self, node: onnx.NodeProto, square: float) -> float:
        """He's rule, with the mean square that really comes in where He assumes a ReLU's."""
        root = self._root(node.input[1])
        shape = self.shapes[root]
        if node.op_type == "Conv":
            fan_in = int(np.prod(shape[1:]))
        elif len(shape) == 4:  # a classifier stored as (1, 1, classes, features)
            fan_in = shape[3]
        else:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            fan_in = shape[1] if transposed else shape[0]
        if root not in self.values:
            std = 1.0 / np.sqrt(fan_in * max(square, 1e-6))
            flat = (int(np.prod(shape[:-1])), shape[-1]) if node.op_type != "Conv" else shape
            self.values[root] = trained_like(self._rng(root), flat, std).reshape(shape)
        return 1.0


def light_model(name: str, seed: int = 0, batch: Batch = 1) -> onnx.ModelProto:
    """Build one of the nine networks that the onnx package holds without their weights.

    Parameters
    ----------
    name : str
        One of `LIGHT_MODELS`.
    batch : int or str
        Images per call; a string makes the dimension symbolic.

    Raises
    ------
    ModelError
        When the name is unknown, or the installed onnx package lacks the file.
    """
    if name not in LIGHT_MODELS:
        raise ModelError(f"no light model '{name}'; there are {', '.join(LIGHT_MODELS)}")
    folder = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data", "light")
    path = os.path.join(folder, f"light_{name}.onnx")
    if not os.path.exists(path):
        raise ModelError(f"the installed onnx package ({onnx.__version__}) lacks light_{name}.onnx")
    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    fillers = {
        node.output[0]: tuple(int(size) for size in constants[node.input[0]])
        for node in graph.node
        if node.op_type == "ConstantOfShape"
    }
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    used = {name for node in nodes for name in node.input}
    shapes = dict(fillers)
    for key, value in constants.items():
        if key in used and value.dtype == np.float32:
            shapes[key] = value.shape
    values: dict[str, np.ndarray] = {
        key: value for key, value in constants.items() if key in used and key not in shapes
    }
    _free_batch(nodes, values, set(shapes))
    values.update(_Initialiser(nodes, shapes, seed).run())
    data = next(value for value in graph.input if value.name not in constants)
    result = graph.output[0]
    inputs = [_tensor(data.name, _with_batch(data, batch))]
    outputs = [_tensor(result.name, _with_batch(result, batch))]
    return _model(f"light_{name}", nodes, inputs, outputs, values, opset=9)


def _free_batch(
    nodes: Sequence[onnx.NodeProto], values: dict[str, np.ndarray], weights: set[str]
) -> None:
    """Let every Reshape of activations copy the batch instead of naming it."""
    for node in nodes:
        if node.op_type == "Reshape" and node.input[0] not in weights:
            target = values[node.input[1]].copy()
            if target.size and target[0] == 1:
                target[0] = 0
                values[node.input[1]] = target


def _with_batch(value: onnx.ValueInfoProto, batch: Batch) -> list[Batch]:
    return [batch, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])]


def _tensor(name: str, shape: Sequence[Batch]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    values: Mapping[str, np.ndarray],
    opset: int,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.ascontiguousarray(v), key) for key, v in values.items()]
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), tensors)
    opsets = [helper.make_opsetid("", opset)]
    # What the opset needs, so that runtimes a few years old still read the file.
    version = max(8, helper.find_min_ir_version_for(opsets))
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=version, producer_name="tvm-sparse"
    )


class _Builder:
    """Collects the nodes of one network, and the shapes of the weights that they need."""

    def __init__(self, opset: int, *, batch_norm: bool = False, dtype: str = "float32") -> None:
        self.opset = opset
        self.batch_norm = batch_norm
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, np.ndarray] = {}

    def op(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append a node; its output is called after it."""
        output = f"{name}_output"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def weight(self, name: str, *shape: int) -> str:
        """Name a weight that is drawn when the model is finished."""
        self.shapes[name] = shape
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Name a constant with a given value."""
        self.constants[name] = np.array(value, dtype)
        return name

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """MatMul and Add, as exporters write a linear layer on more than two dimensions."""
        product = self.op("MatMul", [x, self.weight(f"{name}.weight", inputs, outputs)], name)
        return self.op("Add", [self.weight(f"{name}.bias", outputs), product], f"{name}/Add")

    def gemm(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """Gemm with a transposed weight, as exporters write a linear layer on a matrix."""
        operands = [
            x,
            self.weight(f"{name}.weight", outputs, inputs),
            self.weight(f"{name}.bias", outputs),
        ]
        return self.op("Gemm", operands, name, transB=1)

    def conv(
        self,
        x: str,
        name: str,
        channels: tuple[int, int],
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: str = "",
    ) -> str:
        """Convolve with 'same' padding, from and to `channels`; BatchNorm, activation."""
        inputs, outputs = channels
        operands = [x, self.weight(f"{name}.weight", outputs, inputs // groups, kernel, kernel)]
        if not self.batch_norm:
            operands.append(self.weight(f"{name}.bias", outputs))
        pad = kernel // 2
        y = self.op(
            "Conv",
            operands,
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
            group=groups,
        )
        if self.batch_norm:
            parts = ("weight", "bias", "running_mean", "running_var")
            statistics = [self.weight(f"{name}/bn.{part}", outputs) for part in parts]
            y = self.op("BatchNormalization", [y, *statistics], f"{name}/bn")
        if activation == "relu6":
            low, high = self.constant("zero", 0.0), self.constant("six", 6.0)
            return self.op("Clip", [y, low, high], f"{name}/relu6")
        return self.op("Relu", [y], f"{name}/relu") if activation == "relu" else y

    def classifier(self, x: str, features: int, classes: int) -> str:
        """Average over the image, then one linear layer."""
        pooled = self.op("GlobalAveragePool", [x], "pool")
        return self.gemm(self.op("Flatten", [pooled], "flatten"), "classifier", features, classes)

    def finish(
        self,
        name: str,
        inputs: Mapping[str, Sequence[Batch]],
        output: str,
        output_shape: Sequence[Batch],
        seed: int,
    ) -> onnx.ModelProto:
        """Draw the weights and close the graph, with one output called ``output``."""
        for node in self.nodes:
            node.output[:] = ["output" if value == output else value for value in node.output]
            node.input[:] = ["output" if value == output else value for value in node.input]
        values = _Initialiser(self.nodes, self.shapes, seed).run()
        model = _model(
            name,
            self.nodes,
            [_tensor(key, shape) for key, shape in inputs.items()],
            [_tensor("output", output_shape)],
            {**self.constants, **values},
            self.opset,
        )
        return model if self.dtype == "float32" else in_type(model, self.dtype)


def in_type(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """Copy a float32 network to float16 or bfloat16: weights, activations and results.

    Raises
    ------
    ModelError
        When the type is another one.
    """
    if dtype not in HALF_TYPES:
        raise ModelError(f"networks are rounded to float16 or bfloat16, not to {dtype}")
    kind = helper.np_dtype_to_tensor_dtype(numpy_dtype(dtype))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            rounded = numpy_helper.to_array(tensor).astype(numpy_dtype(dtype))
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return copy


def mlp(
    batch: Batch = 1,
    sizes: Sequence[int] = (784, 1024, 1024, 10),
    seed: int = 0,
    *,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Build linear layers (each a Gemm) with ReLU between them; a string as `batch` is symbolic."""
    builder = _Builder(17, dtype=dtype)
    x = "input"
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        x = builder.gemm(x, f"fc{index + 1}", inputs, outputs)
        if index + 2 < len(sizes):
            x = builder.op("Relu", [x], f"relu{index + 1}")
    return builder.finish("mlp", {"input": (batch, sizes[0])}, x, (batch, sizes[-1]), seed)


def single_matmul(
    m: int = 768,
    k: int = 768,
    n: Batch = 128,
    *,
    bias: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Build one layer of `k` input and `m` output features on `n` tokens: X [n, k] @ W [k, m]."""
    builder = _Builder(17, dtype=dtype)
    if bias:
        y = builder.linear("input", "linear", k, m)
    else:
        y = builder.op("MatMul", ["input", builder.weight("linear.weight", k, m)], "linear")
    return builder.finish("single_matmul", {"input": (n, k)}, y, (n, m), seed)


def single_conv(
    in_channels: int = 128,
    out_channels: int = 128,
    size: int = 28,
    kernel: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: str = "relu",
    batch: Batch = 1,
    seed: int = 0,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Build one convolution with bias on square images, with 'same' padding.

    `activation` is "relu", "relu6" or empty.
    """
    builder = _Builder(17, dtype=dtype)
    y = builder.conv(
        "input",
        "conv",
        (in_channels, out_channels),
        kernel,
        stride=stride,
        groups=groups,
        activation=activation,
    )
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    shape = (batch, in_channels, size, size)
    return builder.finish("single_conv", {"input": shape}, y, (batch, out_channels, out, out), seed)


# MobileNetV1: output channels and stride of each depthwise-separable block (Howard et al. 2017,
# table 1).
_MOBILENET_V1: tuple[tuple[int, int], ...] = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)

# MobileNetV2: expansion, output channels, repeats, stride of the first (Sandler et al. 2018,
# table 2).
_MOBILENET_V2: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v1(
    batch: Batch = 1,
    *,
    batch_norm: bool = False,
    size: int = 224,
    seed: int = 0,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Build MobileNetV1 of width 1.0.

    With `batch_norm` each convolution is followed by a BatchNormalization node; without, it is
    already folded into the convolution's weight and bias.
    """
    builder = _Builder(17, batch_norm=batch_norm, dtype=dtype)
    x = builder.conv("input", "stem", (3, 32), 3, stride=2, activation="relu")
    channels = 32
    for index, (outputs, stride) in enumerate(_MOBILENET_V1, start=1):
        name = f"block{index}"
        x = builder.conv(
            x,
            f"{name}/depthwise",
            (channels, channels),
            3,
            stride=stride,
            groups=channels,
            activation="relu",
        )
        x = builder.conv(x, f"{name}/pointwise", (channels, outputs), 1, activation="relu")
        channels = outputs
    y = builder.classifier(x, channels, 1000)
    return builder.finish("mobilenet_v1", {"input": (batch, 3, size, size)}, y, (batch, 1000), seed)


def mobilenet_v2(
    batch: Batch = 1,
    *,
    batch_norm: bool = False,
    size: int = 224,
    seed: int = 0,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Build MobileNetV2 of width 1.0, with ReLU6; `batch_norm` as in `mobilenet_v1`."""
    builder = _Builder(17, batch_norm=batch_norm, dtype=dtype)
    x = builder.conv("input", "stem", (3, 32), 3, stride=2, activation="relu6")
    channels, index = 32, 0
    for expansion, outputs, repeats, first_stride in _MOBILENET_V2:
        for repeat in range(repeats):
            index += 1
            stride = first_stride if repeat == 0 else 1
            x = _inverted_residual(
                builder, x, f"block{index}", channels, outputs, expansion, stride
            )
            channels = outputs
    x = builder.conv(x, "head", (channels, 1280), 1, activation="relu6")
    y = builder.classifier(x, 1280, 1000)
    return builder.finish("mobilenet_v2", {"input": (batch, 3, size, size)}, y, (batch, 1000), seed)


def _inverted_residual(
    builder: _Builder,
    x: str,
    name: str,
    inputs: int,
    outputs: int,
    expansion: int,
    stride: int,
) -> str:
    hidden = inputs * expansion
    y = x
    if expansion > 1:
        y = builder.conv(y, f"{name}/expand", (inputs, hidden), 1, activation="relu6")
    y = builder.conv(
        y,
        f"{name}/depthwise",
        (hidden, hidden),
        3,
        stride=stride,
        groups=hidden,
        activation="relu6",
    )
    y = builder.conv(y, f"{name}/project", (hidden, outputs), 1)
    if stride == 1 and inputs == outputs:
        y = builder.op("Add", [x, y], f"{name}/residual")
    return y


def bert_encoder(
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
    ffn: int = 3072,
    batch: int = 1,
    seq: int = 128,
    symbolic: bool = False,
    opset: int = 17,
    seed: int = 0,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Build a BERT encoder on embedded tokens: input and output are [batch, seq, hidden].

    Written as PyTorch exports it: MatMul and Add, Softmax, GELU through Erf, and
    LayerNormalization (below opset 17 its parts).

    Parameters
    ----------
    symbolic : bool
        Make the dimensions "batch" and "seq" symbolic; the numbers are ignored then.

    Raises
    ------
    ModelError
        When `heads` does not divide `hidden`.
    """
    if hidden % heads:
        raise ModelError(f"{heads} heads do not divide {hidden} hidden features")
    builder = _Builder(opset, dtype=dtype)
    builder.constant("split_heads", [0, 0, heads, hidden // heads], np.int64)
    builder.constant("merge_heads", [0, 0, hidden], np.int64)
    builder.constant("sqrt_head", np.sqrt(hidden // heads))
    x = "input"
    for index in range(layers):
        prefix = f"encoder.layer.{index}"
        attended = _attention(builder, x, f"{prefix}.attention", hidden)
        x = _layer_norm(
            builder,
            builder.op("Add", [attended, x], f"{prefix}.attention.residual"),
            f"{prefix}.attention.norm",
            hidden,
        )
        inner = builder.linear(x, f"{prefix}.intermediate", hidden, ffn)
        outer = builder.linear(
            _gelu(builder, inner, f"{prefix}.gelu"), f"{prefix}.output", ffn, hidden
        )
        x = _layer_norm(
            builder,
            builder.op("Add", [outer, x], f"{prefix}.residual"),
            f"{prefix}.norm",
            hidden,
        )
    shape: tuple[Batch, ...] = ("batch", "seq", hidden) if symbolic else (batch, seq, hidden)
    return builder.finish("bert_encoder", {"input": shape}, x, shape, seed)


def _attention(builder: _Builder, x: str, name: str, hidden: int) -> str:
    def heads(part: str, order: Sequence[int]) -> str:
        y = builder.linear(x, f"{name}.{part}", hidden, hidden)
        y = builder.op("Reshape", [y, "split_heads"], f"{name}.{part}/split")
        return builder.op("Transpose", [y], f"{name}.{part}/transpose", perm=list(order))

    query, key, value = (
        heads("query", (0, 2, 1, 3)),
        heads("key", (0, 2, 3, 1)),
        heads("value", (0, 2, 1, 3)),
    )
    scores = builder.op("MatMul", [query, key], f"{name}.scores")
    scores = builder.op("Div", [scores, "sqrt_head"], f"{name}.scale")
    weights = builder.op("Softmax", [scores], f"{name}.softmax", axis=-1)
    context = builder.op("MatMul", [weights, value], f"{name}.context")
    context = builder.op("Transpose", [context], f"{name}.context/transpose", perm=[0, 2, 1, 3])
    context = builder.op("Reshape", [context, "merge_heads"], f"{name}.context/merge")
    return builder.linear(context, f"{name}.output", hidden, hidden)


def _gelu(builder: _Builder, x: str, name: str) -> str:
    sqrt2, one, half = (
        builder.constant("sqrt2", np.sqrt(2.0)),
        builder.constant("one", 1.0),
        builder.constant("half", 0.5),
    )
    y = builder.op("Erf", [builder.op("Div", [x, sqrt2], f"{name}/Div")], f"{name}/Erf")
    y = builder.op("Mul", [x, builder.op("Add", [y, one], f"{name}/Add")], f"{name}/Mul")
    return builder.op("Mul", [y, half], f"{name}/Half")


def _layer_norm(builder: _Builder, x: str, name: str, features: int) -> str:
    gamma = builder.weight(f"{name}.weight", features)
    beta = builder.weight(f"{name}.bias", features)
    epsilon = 1e-12
    if builder.opset >= 17:
        return builder.op("LayerNormalization", [x, gamma, beta], name, axis=-1, epsilon=epsilon)
    mean = builder.op("ReduceMean", [x], f"{name}/ReduceMean", axes=[-1])
    centred = builder.op("Sub", [x, mean], f"{name}/Sub")
    square = builder.op("Pow", [centred, builder.constant("two", 2.0)], f"{name}/Pow")
    variance = builder.op("ReduceMean", [square], f"{name}/Variance", axes=[-1])
    shifted = builder.op("Add", [variance, builder.constant("epsilon", epsilon)], f"{name}/Shift")
    y = builder.op("Div", [centred, builder.op("Sqrt", [shifted], f"{name}/Sqrt")], f"{name}/Div")
    return builder.op("Add", [builder.op("Mul", [y, gamma], f"{name}/Mul"), beta], f"{name}/Add")


# Every network by name; the builders take `seed`, and more that their signatures say.
ZOO: Mapping[str, Callable[..., onnx.ModelProto]] = {
    "bert-base": bert_encoder,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "mlp": mlp,
    "single_matmul": single_matmul,
    "single_conv": single_conv,
    "bvlc_alexnet": partial(light_model, "bvlc_alexnet"),
    "densenet121": partial(light_model, "densenet121"),
    "inception_v1": partial(light_model, "inception_v1"),
    "inception_v2": partial(light_model, "inception_v2"),
    "resnet50": partial(light_model, "resnet50"),
    "shufflenet": partial(light_model, "shufflenet"),
    "squeezenet": partial(light_model, "squeezenet"),
    "vgg19": partial(light_model, "vgg19"),
    "zfnet512": partial(light_model, "zfnet512"),
}


def build(name: str, *, dtype: str = "float32", **options: Any) -> onnx.ModelProto:
    """Build the network called `name` in a type, with the options of its builder.

    Raises
    ------
    ModelError
        When there is no such network.
    """
    if name not in ZOO:
        raise ModelError(f"no network '{name}' in the zoo; there are {', '.join(ZOO)}")
    model = ZOO[name](**options)
    return model if dtype == "float32" else in_type(model, dtype)
