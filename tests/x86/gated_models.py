"""ONNX graphs of LLaMA-like encoders: RMS norms, grouped heads, gated feed-forward nets."""

from __future__ import annotations

import numpy as np
from attention_models import Layer
from onnx import helper


class GatedLayer(Layer):
    """Operators as exporters write them, node by node."""

    density = 0.1

    def product(self, x, inputs, outputs):
        """Multiply by a pruned weight."""
        weight = self.rng.standard_normal((inputs, outputs)) / np.sqrt(inputs * self.density)
        weight *= self.rng.random(weight.shape) < self.density
        return self.op("MatMul", x, self.constant(weight))

    def rms_norm(self, x, features):
        mean = self.op("ReduceMean", self.op("Pow", x, self.constant(2.0)), axes=[-1])
        root = self.op("Sqrt", self.op("Add", mean, self.constant(1e-6)))
        gamma = self.constant(1 + 0.1 * self.rng.standard_normal(features))
        return self.op("Mul", self.op("Div", x, root), gamma)

    def split(self, x, sizes):
        self.count += 1
        names = [f"v{self.count}_{number}" for number in range(len(sizes))]
        inputs = [x, self.constant(sizes, np.int64)]
        self.nodes.append(helper.make_node("Split", inputs, names, axis=-1))
        return names

    def turned(self, x, heads, perm):
        split = self.constant([self.batch, self.tokens, heads, self.depth], np.int64)
        return self.op("Transpose", self.op("Reshape", x, split), perm=list(perm))

    def rotary(self, x, turned=True):
        """Turn [batch, heads, tokens, depth] by the angles; or [batch, tokens, heads, depth]."""
        half = self.depth // 2
        speeds = np.tile(100.0 ** -(np.arange(half) / half), 2)
        angles = np.arange(self.tokens)[:, None] * speeds
        angles = angles[None, None] if turned else angles[None, :, None]
        low, high = self.split(x, [half, half])
        swapped = self.op("Concat", self.op("Neg", high), low, axis=-1)
        straight = self.op("Mul", x, self.constant(np.cos(angles)))
        return self.op("Add", straight, self.op("Mul", swapped, self.constant(np.sin(angles))))

    def attend(self, query, key, value, rotary="none"):
        b, t, h, kv, d = self.batch, self.tokens, self.heads, self.kv_heads, self.depth
        if rotary == "before turning":
            split = [self.constant([b, t, count, d], np.int64) for count in (h, kv)]
            query = self.rotary(self.op("Reshape", query, split[0]), turned=False)
            key = self.rotary(self.op("Reshape", key, split[1]), turned=False)
            query = self.op("Transpose", query, perm=[0, 2, 1, 3])
            key = self.op("Transpose", key, perm=[0, 2, 3, 1])
        elif rotary == "behind turning":
            query = self.rotary(self.turned(query, h, (0, 2, 1, 3)))
            key = self.rotary(self.turned(key, kv, (0, 2, 1, 3)))
            key = self.op("Transpose", key, perm=[0, 1, 3, 2])
        else:
            query = self.turned(query, h, (0, 2, 1, 3))
            key = self.turned(key, kv, (0, 2, 3, 1))
        key = self.repeated(key, (b, kv, d, t))
        value = self.repeated(self.turned(value, kv, (0, 2, 1, 3)), (b, kv, t, d))
        scores = self.op("Mul", self.op("MatMul", query, key), self.constant(float(d) ** -0.5))
        scores = self.op("Add", scores, self.constant(np.where(np.tri(t, dtype=bool), 0, -1e9)))
        context = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        merged = self.constant([b, t, h * d], np.int64)
        return self.op("Reshape", self.op("Transpose", context, perm=[0, 2, 1, 3]), merged)

    def gate(self, a, kind):
        if kind == "silu":
            return self.op("Mul", a, self.op("Sigmoid", a))
        erf = self.op("Erf", self.op("Div", a, self.constant(2**0.5)))
        one = self.op("Add", erf, self.constant(1.0))
        return self.op("Mul", self.op("Mul", a, one), self.constant(0.5))


def gated_encoder(layers=2, ffn=96, gate="silu", fused=False, rotary="none", **sizes):
    """Build an encoder; `fused` has one product for the gate and what it opens, and one for QKV."""
    g = GatedLayer(**sizes)
    x, hidden, kv = "x", g.heads * g.depth, g.kv_heads * g.depth

    def products(x, widths):
        if fused:
            return g.split(g.product(x, hidden, sum(widths)), widths)
        return [g.product(x, hidden, width) for width in widths]

    for _ in range(layers):
        context = g.attend(*products(g.rms_norm(x, hidden), [hidden, kv, kv]), rotary)
        x = g.op("Add", x, g.product(context, hidden, hidden))
        a, b = products(g.rms_norm(x, hidden), [ffn, ffn])
        x = g.op("Add", x, g.product(g.op("Mul", g.gate(a, gate), b), ffn, hidden))
    g.nodes.append(helper.make_node("Identity", [g.rms_norm(x, hidden)], ["y"]))
    return g.proto()
