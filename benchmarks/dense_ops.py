"""Measure what stays dense, operator by operator, against ONNX Runtime and OpenVINO in float32.

    python benchmarks/dense_ops.py                # all; writes benchmarks/results/dense_ops.json
    python benchmarks/dense_ops.py --only softmax

Each operator runs eight times in a row in a model of its own, on shapes of the benchmark networks,
so that what a call costs does not count. The table goes into docs/networks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from networks import PAGE, read_results, rewrite_page, same_run
from onnx import TensorProto, helper, numpy_helper

from tvm_sparse.bench import BenchResult, bench
from tvm_sparse.errors import SparseError

RESULTS = Path(__file__).resolve().parent / "results" / "dense_ops.json"
BEGIN, END = "<!-- dense:begin -->", "<!-- dense:end -->"
TIMES = 8
ASKED = 1 / 1.2

Shape = tuple[int, ...]


@dataclass
class Chain:
    """A graph that grows node by node."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        """Add a random weight."""
        rng = np.random.default_rng(len(self.weights))
        value = (scale * rng.standard_normal(shape)).astype(np.float32)
        return self.constant(value)

    def constant(self, value: np.ndarray) -> str:
        """Add a constant."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def model(self, x: Shape, last: str) -> onnx.ModelProto:
        """Close the graph."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "chain",
            [info("x", TensorProto.FLOAT, x)],
            [info(last, TensorProto.FLOAT, None)],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def matmul(tokens: int, inner: int, outer: int) -> onnx.ModelProto:
    """Multiply by weights, there and back."""
    chain, x = Chain(), "x"
    for index in range(TIMES):
        k, m = (inner, outer) if index % 2 == 0 else (outer, inner)
        x = chain.op("MatMul", x, chain.weight(k, m, scale=k**-0.5))
    return chain.model((tokens, inner), x)


def conv(inputs: int, outputs: int, size: int, kernel: int, groups: int = 1) -> onnx.ModelProto:
    """Convolutions of stride 1, there and back."""
    chain, x = Chain(), "x"
    for index in range(TIMES):
        ic, oc = (inputs, outputs) if index % 2 == 0 else (outputs, inputs)
        weight = chain.weight(
            oc, ic // groups, kernel, kernel, scale=(ic // groups * kernel**2) ** -0.5
        )
        x = chain.op("Conv", x, weight, group=groups, pads=[kernel // 2] * 4)
    return chain.model((1, inputs, size, size), x)


def first_conv(outputs: int, kernel: int) -> onnx.ModelProto:
    """Convolve eight images, as the first layer of a network does."""
    chain = Chain()
    weight = chain.weight(outputs, 3, kernel, kernel, scale=0.1)
    y = chain.op("Conv", "x", weight, strides=[2, 2], pads=[kernel // 2] * 4)
    return chain.model((TIMES, 3, 224, 224), y)


def attention_products(heads: int, tokens: int, depth: int) -> onnx.ModelProto:
    """Batched products as in attention: scores, then the sum of values."""
    chain, x = Chain(), "x"
    straight = chain.op("Relu", x)
    turned = chain.op("Transpose", straight, perm=[0, 1, 3, 2])
    for index in range(TIMES):
        x = chain.op("MatMul", x, turned if index % 2 == 0 else straight)
    return chain.model((1, heads, tokens, depth), x)


def repeated(kind: str, x: Shape, **attributes: object) -> onnx.ModelProto:
    """Repeat an operator of one input that keeps its shape."""
    chain, value = Chain(), "x"
    for _ in range(TIMES):
        value = chain.op(kind, value, **attributes)
    return chain.model(x, value)


def layer_norm(tokens: int, features: int) -> onnx.ModelProto:
    """Layer normalisation over features."""
    chain, x = Chain(), "x"
    for _ in range(TIMES):
        x = chain.op("LayerNormalization", x, chain.weight(features), chain.weight(features))
    return chain.model((1, tokens, features), x)


def pool(
    kind: str, image: tuple[int, int], kernel: Sequence[int] = (), strides: Sequence[int] = ()
) -> onnx.ModelProto:
    """Pool eight images of so many channels and rows."""
    chain = Chain()
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": [k // 2 for k in kernel] * 2}
    if kind != "MaxPool":
        attributes.pop("pads")
    given = {key: value for key, value in attributes.items() if value}
    channels, size = image
    return chain.model((TIMES, channels, size, size), chain.op(kind, "x", **given))


def resize(channels: int, size: int) -> onnx.ModelProto:
    """Nearest neighbours, twice as large, of eight images."""
    chain = Chain()
    scales = chain.constant(np.array([1, 1, 2, 2], np.float32))
    y = chain.op("Resize", "x", "", scales, mode="nearest")
    return chain.model((TIMES, channels, size, size), y)


OPERATORS: dict[str, Callable[[], onnx.ModelProto]] = {
    "matmul 768x768, 128 tokens": lambda: matmul(128, 768, 768),
    "matmul 768x3072, 128 tokens": lambda: matmul(128, 768, 3072),
    "matmul 768x768, 16 tokens": lambda: matmul(16, 768, 768),
    "matmul 768x768, 1 token": lambda: matmul(1, 768, 768),
    "first conv 7x7/2 3->64@224": lambda: first_conv(64, 7),
    "first conv 3x3/2 3->32@224": lambda: first_conv(32, 3),
    "conv 1x1 64->256@56": lambda: conv(64, 256, 56, 1),
    "conv 1x1 256->1024@14": lambda: conv(256, 1024, 14, 1),
    "conv 3x3 64->64@56": lambda: conv(64, 64, 56, 3),
    "conv 3x3 256->256@14": lambda: conv(256, 256, 14, 3),
    "conv 3x3 512->512@7": lambda: conv(512, 512, 7, 3),
    "depthwise 3x3 128@56": lambda: conv(128, 128, 56, 3, 128),
    "depthwise 3x3 512@14": lambda: conv(512, 512, 14, 3, 512),
    "batched matmul 12 heads, 128x64": lambda: attention_products(12, 128, 64),
    "softmax 12x128x128": lambda: repeated("Softmax", (1, 12, 128, 128), axis=-1),
    "layer norm 128x768": lambda: layer_norm(128, 768),
    "gelu 128x3072": lambda: repeated("Gelu", (1, 128, 3072)),
    "max pool 3x3/2 64@112": lambda: pool("MaxPool", (64, 112), [3, 3], [2, 2]),
    "average pool 2x2/2 128@56": lambda: pool("AveragePool", (128, 56), [2, 2], [2, 2]),
    "global average pool 2048@7": lambda: pool("GlobalAveragePool", (2048, 7)),
    "resize 2x, 64@28": lambda: resize(64, 28),
}


def verdicts(result: BenchResult) -> list[str]:
    """Hold every operator against what was aimed at."""
    lines = []
    for case in result.cases:
        if case.speedup:
            word = "met   " if case.speedup >= ASKED else "MISSED"
            lines.append(
                f"{word}  {case.name}: {1 / case.speedup:.2f} of the better library's time"
            )
    return lines


def merged(old: BenchResult | None, fresh: BenchResult) -> BenchResult:
    """Put new cases in place of those of their names; what another machine measured is dropped."""
    known = {case.name: case for case in old.cases} if old and same_run(old, fresh) else {}
    known.update({case.name: case for case in fresh.cases})
    return replace(fresh, cases=tuple(known[name] for name in OPERATORS if name in known))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="operators whose name holds this; the others stay")
    parser.add_argument("--seconds", type=float, default=3.0, help="rounds of one operator")
    options = parser.parse_args(argv)
    result = read_results(RESULTS)
    try:
        for name, build in OPERATORS.items():
            if options.only and options.only not in name:
                continue
            fresh = bench(
                build(), ("onnxruntime", "openvino"), 1, name=name, seconds=options.seconds
            )
            print(fresh.table().splitlines()[1], flush=True)
            result = merged(result, fresh)
            result.to_json(RESULTS)
        if result is None:
            raise SparseError(f"no operator's name holds '{options.only}'")
        print("\n".join([str(result), *verdicts(result)]))
        text = result.markdown() + "\n\n```\n" + "\n".join(verdicts(result)) + "\n```"
        rewrite_page(PAGE, text, (BEGIN, END))
    except SparseError as error:
        print(f"dense_ops: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
