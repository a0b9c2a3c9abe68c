"""ONNX graphs with attention, written as frameworks write it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Layer:
    """Self-attention between two projections, node by node."""

    def __init__(self, batch=1, tokens=32, heads=2, depth=16, kv_heads=None, seed=0):
        self.batch, self.tokens, self.heads, self.depth = batch, tokens, heads, depth
        self.kv_heads = kv_heads or heads
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs = {"x": (batch, tokens, heads * depth)}
        self.outputs = ["y"]
        self.count = 0

    def op(self, kind, *inputs, **attributes):
        self.count += 1
        self.nodes.append(helper.make_node(kind, list(inputs), [f"v{self.count}"], **attributes))
        return f"v{self.count}"

    def constant(self, value, dtype=np.float32):
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def linear(self, x, inputs, outputs):
        weight = self.rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        weight *= self.rng.random(weight.shape) < 0.3
        y = self.op("MatMul", x, self.constant(weight))
        return self.op("Add", y, self.constant(0.1 * self.rng.standard_normal(outputs)))

    def heads_of(self, x, order, heads):
        projected = self.linear(x, self.heads * self.depth, heads * self.depth)
        split = self.constant([self.batch, self.tokens, heads, self.depth], np.int64)
        return self.op("Transpose", self.op("Reshape", projected, split), perm=list(order))

    def repeated(self, x, shape):
        """Repeat each head for its group, as grouped-query attention is exported."""
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        axes = self.constant([2], np.int64)
        wide = [shape[0], shape[1], times, *shape[2:]]
        wide = self.op("Expand", self.op("Unsqueeze", x, axes), self.constant(wide, np.int64))
        merged = self.constant([shape[0], shape[1] * times, *shape[2:]], np.int64)
        return self.op("Reshape", wide, merged)

    def finish(self, context):
        turned = self.op("Transpose", context, perm=[0, 2, 1, 3])
        width = self.heads * self.depth
        merged = self.constant([self.batch, self.tokens, width], np.int64)
        result = self.linear(self.op("Reshape", turned, merged), width, width)
        self.nodes.append(helper.make_node("Identity", [result], ["y"]))
        return self.proto()

    def proto(self):
        def info(name, shape):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "attention",
            [info(name, shape) for name, shape in self.inputs.items()],
            [info(name, None) for name in self.outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def attention(style="divided", mask="none", **sizes):
    """Build one layer; `style` is where the scale stands, `mask` what is added to the scores."""
    g = Layer(**sizes)
    scale = float(g.depth) ** -0.5
    straight, turned = (0, 2, 1, 3), (0, 2, 3, 1)
    query = g.heads_of("x", straight, g.heads)
    if style == "turned twice":
        key = g.heads_of("x", straight, g.kv_heads)
        key = g.repeated(key, (g.batch, g.kv_heads, g.tokens, g.depth))
        key = g.op("Transpose", key, perm=[0, 1, 3, 2])
    else:
        key = g.heads_of("x", turned, g.kv_heads)
        key = g.repeated(key, (g.batch, g.kv_heads, g.depth, g.tokens))
    value = g.heads_of("x", straight, g.kv_heads)
    value = g.repeated(value, (g.batch, g.kv_heads, g.tokens, g.depth))
    if style == "both scaled":
        query = g.op("Mul", query, g.constant(scale**0.5))
        key = g.op("Mul", g.constant(scale**0.5), key)
    scores = g.op("MatMul", query, key)
    if style in ("divided", "turned twice"):
        scores = g.op("Div", scores, g.constant(1 / scale))
    if style == "multiplied":
        scores = g.op("Mul", g.constant(scale), scores)
    if mask != "none":
        scores = g.op("Add", *_mask(g, mask, scores))
    if style == "observed":
        g.nodes.append(helper.make_node("Identity", [scores], ["scores"]))
        g.outputs.append("scores")
    shares = g.op("Softmax", scores, axis=-1)
    return g.finish(g.op("MatMul", shares, value))


def stacked_attention(**sizes):
    """Build one layer as PyTorch exports `nn.MultiheadAttention(batch_first=True)`.

    The sequence comes before the batch; queries, keys and values are stacked on an axis that is
    selected from, and heads are split with the batch.
    """
    g = Layer(**sizes)
    width, batch, tokens = g.heads * g.depth, g.batch, g.tokens
    turned = g.op("Transpose", "x", perm=[1, 0, 2])
    stacked = g.op(
        "Reshape",
        g.linear(turned, width, 3 * width),
        g.constant([tokens, batch, 3, width], np.int64),
    )
    stacked = g.op("Unsqueeze", stacked, g.constant([0], np.int64))
    stacked = g.op("Transpose", stacked, perm=[3, 1, 2, 0, 4])
    stacked = g.op("Squeeze", stacked, g.constant([-2], np.int64))
    query, key, value = (_of_stack(g, stacked, index) for index in range(3))
    key = g.op("Transpose", key, perm=[0, 2, 1])
    four = g.constant([batch, g.heads, g.depth, tokens], np.int64)
    scale = float(g.depth) ** -0.25
    query = g.op("Mul", _four(g, query), g.constant(scale))
    scores = g.op("MatMul", query, g.op("Mul", g.op("Reshape", key, four), g.constant(scale)))
    context = g.op("MatMul", g.op("Softmax", scores, axis=-1), _four(g, value))
    context = g.op("Transpose", context, perm=[2, 0, 1, 3])
    flat = g.op("Reshape", context, g.constant([tokens * batch, width], np.int64))
    result = g.linear(flat, width, width)
    result = g.op("Reshape", result, g.constant([tokens, batch, width], np.int64))
    result = g.op("Transpose", result, perm=[1, 0, 2])
    g.nodes.append(helper.make_node("Identity", [result], ["y"]))
    return g.proto()


def _of_stack(g, stacked, index):
    selected = g.op("Gather", stacked, g.constant(index, np.int64), axis=0)
    together = g.constant([g.tokens, g.batch * g.heads, g.depth], np.int64)
    return g.op("Transpose", g.op("Reshape", selected, together), perm=[1, 0, 2])


def _four(g, value):
    return g.op("Reshape", value, g.constant([g.batch, g.heads, g.tokens, g.depth], np.int64))


def _mask(g, kind, scores):
    t = g.tokens
    if kind == "causal":
        return scores, g.constant(np.where(np.tri(t, dtype=bool), 0, -1e9))
    if kind == "causal of -inf":
        return g.constant(np.where(np.tri(t, dtype=bool), 0, -np.inf)[None, None]), scores
    shapes = {"keys": (g.batch, 1, 1, t), "pairs": (1, g.heads, t, t), "shared pairs": (t, t)}
    g.inputs["mask"] = shapes[kind]
    return scores, "mask"
