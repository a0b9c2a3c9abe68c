"""Channels that are zero leave the graph, and ONNX Runtime computes the same without them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tvm_sparse import zoo
from tvm_sparse.errors import SparseError
from tvm_sparse.pruning import prune, prune_with_report, remove_dead_channels

ort = pytest.importorskip("onnxruntime")


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)


def feed_of(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: rng.standard_normal(
            [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in model.graph.input
        if value.name not in weights
    }


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def smaller(model: onnx.ModelProto, tolerance: float = 1e-5):
    """Remove channels, hold the two models against each other, and return model and report."""
    before = model.SerializeToString()
    small, removed = remove_dead_channels(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(small, full_check=True)
    feed = feed_of(model)
    for wanted, found in zip(run(model, feed), run(small, feed), strict=True):
        scale = np.abs(wanted).max() + 1e-6
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)
    return small, {entry.layer: entry for entry in removed}


class Net:
    """A graph that grows node by node; weights are random, with the rows in `dead` zero."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def conv(self, x, name, inp, out, dead=(), k=1, bias=True, groups=1, **attributes) -> str:
        weight = self.rng.standard_normal((out, inp // groups, k, k)).astype(np.float32)
        weight[list(dead)] = 0
        inputs = [x, self.constant(f"{name}.weight", weight)]
        if bias:
            values = self.rng.standard_normal(out).astype(np.float32)
            inputs.append(self.constant(f"{name}.bias", values))
        return self.node("Conv", inputs, name, group=groups, **attributes)

    def gemm(self, x, name, inp, out, dead=(), **attributes) -> str:
        weight = self.rng.standard_normal((out, inp)).astype(np.float32)
        weight[list(dead)] = 0
        bias = self.rng.standard_normal(out).astype(np.float32)
        names = [self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.node("Gemm", [x, *names], name, transB=1, **attributes)

    def norm(self, x: str, name: str, channels: int) -> str:
        values = self.rng.uniform(0.5, 2, (4, channels)).astype(np.float32)
        parts = ("scale", "shift", "mean", "variance")
        names = [self.constant(f"{name}.{p}", v) for p, v in zip(parts, values, strict=True)]
        return self.node("BatchNormalization", [x, *names], name)

    def model(self, y: str, shape=(2, 3, 6, 6)) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", 17)]
        return onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opsets, ir_version=8)
        )


def test_a_channel_goes_from_its_producer_and_its_consumer_and_its_constant_into_a_bias():
    net = Net()
    x = net.node("Relu", [net.conv("x", "a", 3, 8, dead=[1, 5], k=3, pads=[1] * 4)], "relu")
    model = net.model(net.conv(net.norm(x, "bn", 8), "b", 8, 4))
    small, report = smaller(model)
    shapes = shapes_of(small)
    assert shapes["a.weight"] == (6, 3, 3, 3)
    assert shapes["a.bias"] == shapes["bn.mean"] == (6,)
    assert shapes["b.weight"] == (4, 6, 1, 1)
    assert (report["a"].channels, report["a"].removed, report["a"].left) == (8, 2, 0)


def test_a_consumer_without_a_bias_gets_one():
    net = Net()
    x = net.conv("x", "a", 3, 8, dead=[0])
    small, _ = smaller(net.model(net.conv(x, "b", 8, 4, bias=False)))
    assert len(small.graph.node[1].input) == 3
    net = Net()
    weight = net.constant("m.weight", net.rng.standard_normal((6, 5)).astype(np.float32))
    x = net.gemm("x", "a", 4, 6, dead=[2, 3])
    small, _ = smaller(net.model(net.node("MatMul", [x, weight], "m"), (7, 4)))
    assert shapes_of(small)["m.weight"] == (4, 5)
    assert [node.op_type for node in small.graph.node] == ["Gemm", "MatMul", "Add"]


def test_a_constant_that_is_not_zero_does_not_pass_padding_and_the_report_says_so():
    net = Net()
    x = net.conv("x", "a", 3, 8, dead=[1, 5])
    model = net.model(net.conv(x, "b", 8, 4, k=3, pads=[1] * 4))
    small, report = smaller(model)
    assert shapes_of(small) == shapes_of(model)
    assert report["a"].left == 2
    assert "meets the zeros around the input of 'b'" in report["a"].reason
    bias = next(t for t in model.graph.initializer if t.name == "a.bias")
    bias.CopyFrom(numpy_helper.from_array(np.zeros(8, np.float32), "a.bias"))
    small, _ = smaller(model)
    assert shapes_of(small)["b.weight"] == (4, 6, 3, 3)


def test_of_a_sum_only_channels_go_that_are_zero_in_all_its_branches():
    net = Net()
    stem = net.conv("x", "stem", 3, 8)
    left = net.conv(stem, "left", 8, 8, dead=[1, 2, 3])
    right = net.conv(stem, "right", 8, 8, dead=[2, 3, 4])
    small, report = smaller(net.model(net.conv(net.node("Add", [left, right], "sum"), "c", 8, 4)))
    assert shapes_of(small)["left.weight"] == shapes_of(small)["right.weight"] == (6, 8, 1, 1)
    assert report["left"].removed == 2
    assert report["left"].left == 1
    assert "'c' reads them, and they are not constant there" in report["left"].reason


def test_depthwise_convolutions_lose_what_their_producer_loses_and_the_other_way_round():
    net = Net()
    x = net.node("Clip", [net.conv("x", "a", 3, 6, dead=[0])], "relu6")
    x = net.conv(x, "dw", 6, 6, dead=[3], k=3, groups=6)
    small, report = smaller(net.model(net.conv(x, "b", 6, 4)))
    assert shapes_of(small)["dw.weight"] == (4, 1, 3, 3)
    # Nothing reads the channel that the depthwise convolution drops.
    assert report["a"].removed == 2
    [node] = [node for node in small.graph.node if node.name == "dw"]
    assert helper.get_node_attr_value(node, "group") == 4


def test_channels_are_followed_through_concat_pooling_and_flatten_to_a_gemm():
    net = Net()
    a = net.conv("x", "a", 3, 4, dead=[0])
    b = net.conv("x", "b", 3, 5, dead=[1, 4])
    x = net.node("Concat", [a, b], "cat", axis=1)
    x = net.node("MaxPool", [x], "max", kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("AveragePool", [x], "avg", kernel_shape=[2, 2], pads=[1] * 4)
    x = net.node("Flatten", [x], "flat")
    small, _ = smaller(net.model(net.gemm(x, "fc", 9 * 16, 3)))
    assert shapes_of(small)["fc.weight"] == (3, 6 * 16)


@pytest.mark.parametrize("target", [[0, -1], [2, 8 * 36], [-1, 8 * 36], [2, 8, 36], [0, 0, -1]])
def test_a_reshape_is_told_the_new_number(target):
    net = Net()
    x = net.conv("x", "a", 3, 8, dead=[1, 5])
    x = net.node("Reshape", [x, net.constant("shape", np.array(target, np.int64))], "flat")
    if len(target) == 3:
        weight = net.constant("shape2", np.array([0, -1], np.int64))
        x = net.node("Reshape", [x, weight], "flat2")
    small, _ = smaller(net.model(net.gemm(x, "fc", 8 * 36, 3)))
    assert shapes_of(small)["fc.weight"] == (3, 6 * 36)


def test_a_gate_of_squeeze_and_excitation_shrinks_with_what_it_scales():
    net = Net()
    x = net.conv("x", "a", 3, 8, dead=[1, 5])
    x = net.node("Relu", [net.norm(x, "bn", 8)], "relu")
    # Zero after the product only where it is zero before, so make the normalisation end there.
    for tensor in net.tensors:
        if tensor.name == "bn.shift":
            values = np.array(numpy_helper.to_array(tensor))
            values[[1, 5]] = -100
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    g = net.node("GlobalAveragePool", [x], "pool")
    g = net.node("Relu", [net.conv(g, "squeeze", 8, 2)], "relu2")
    g = net.node("Sigmoid", [net.conv(g, "excite", 2, 8)], "gate")
    x = net.node("Mul", [x, g], "scaled")
    small, _ = smaller(net.model(net.conv(x, "b", 8, 4, k=3, pads=[1] * 4)))
    shapes = shapes_of(small)
    assert shapes["squeeze.weight"] == (2, 6, 1, 1)
    assert shapes["excite.weight"] == (6, 2, 1, 1)
    assert shapes["b.weight"] == (4, 6, 3, 3)


def test_neurons_of_a_transformer_go_through_gelu():
    model = zoo.bert_encoder(layers=1, hidden=32, heads=2, ffn=64, seq=8)
    skip = ["*attention*", "encoder.layer.0.output*"]
    report = prune_with_report(model, "neuron", 0.5, scope="layer", skip=skip, remove_channels=True)
    plain = prune(model, "neuron", 0.5, scope="layer", skip=skip)
    feed = feed_of(model)
    [wanted], [found] = run(plain, feed), run(report.model, feed)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    assert shapes_of(report.model)["encoder.layer.0.output.weight"] == (32, 32)


def test_what_is_not_known_keeps_its_channels_with_the_reason():
    net = Net()
    x = net.conv("x", "a", 3, 8, dead=[1, 5])
    small, report = smaller(net.model(net.conv(net.node("LRN", [x], "lrn", size=3), "b", 8, 4)))
    assert shapes_of(small)["a.weight"] == (8, 3, 1, 1)
    assert report["a"].reason.startswith("they reach the LRN 'lrn'")
    net = Net()
    x = net.conv(net.conv("x", "a", 3, 8, dead=[1]), "g", 8, 8, groups=2)
    _, report = smaller(net.model(x))
    assert "grouped convolution" in report["a"].reason


def test_outputs_of_the_model_keep_their_shape():
    net = Net()
    model = net.model(net.conv("x", "a", 3, 8, dead=[1, 5]))
    small, report = smaller(model)
    assert small.SerializeToString() == model.SerializeToString()
    assert report["a"].reason == "they are part of an output of the model"


def test_a_layer_keeps_one_channel_at_least():
    net = Net()
    small, report = smaller(net.model(net.conv(net.conv("x", "a", 3, 4, dead=range(4)), "b", 4, 2)))
    assert shapes_of(small)["a.weight"] == (1, 3, 1, 1)
    assert report["a"].reason == "a layer keeps one channel at least"


def test_a_constant_that_two_nodes_read_is_cut_for_each():
    net = Net()
    shift = net.constant("shift", net.rng.standard_normal((8, 1, 1)).astype(np.float32))
    a = net.node("Add", [net.conv("x", "a", 3, 8, dead=[1]), shift], "sum_a")
    b = net.node("Add", [net.conv("x", "b", 3, 8, dead=[2, 3]), shift], "sum_b")
    y = net.node("Add", [net.conv(a, "c", 8, 4), net.conv(b, "d", 8, 4)], "y")
    small, _ = smaller(net.model(y))
    assert sorted(s for n, s in shapes_of(small).items() if "shift" in n) == [(6, 1, 1), (7, 1, 1)]


def test_a_weight_that_two_layers_share_stays():
    net = Net()
    x = net.conv("x", "a", 3, 3, dead=[1])
    x = net.node("Conv", [x, "a.weight", "a.bias"], "again")
    _, report = smaller(net.model(net.conv(x, "b", 3, 2)))
    assert not any(entry.removed for entry in report.values())


def test_layers_that_lose_all_of_their_inputs_make_constants_in_turn():
    net = Net()
    x = net.conv("x", "a", 3, 8, dead=[1, 5])
    x = net.conv(x, "b", 8, 4)
    weight = next(t for t in net.tensors if t.name == "b.weight")
    values = np.array(numpy_helper.to_array(weight))
    values[2, [0, 2, 3, 4, 6, 7]] = 0
    weight.CopyFrom(numpy_helper.from_array(values, "b.weight"))
    small, _ = smaller(net.model(net.conv(x, "c", 4, 2)))
    assert shapes_of(small)["c.weight"] == (2, 3, 1, 1)


ACTIVATIONS = ("Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Tanh", "Softplus", "Erf", "Identity")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.2, 0.8))
def test_random_networks_with_residuals_compute_the_same(seed, share):
    rng = np.random.default_rng(seed)
    net = Net(seed)
    x = net.conv("x", "stem", 3, 8, k=3, pads=[1] * 4)
    for index in range(4):
        kind = rng.integers(4)
        y = net.conv(x, f"c{index}", 8, 8, k=1 + 2 * (kind == 1), pads=[int(kind == 1)] * 4)
        if kind == 2:
            y = net.conv(y, f"d{index}", 8, 8, k=3, groups=8, pads=[1] * 4)
        if rng.random() < 0.5:
            y = net.norm(y, f"n{index}", 8)
        y = net.node(ACTIVATIONS[rng.integers(len(ACTIVATIONS))], [y], f"act{index}")
        y = net.conv(y, f"e{index}", 8, 8)
        if rng.random() < 0.6:
            y = net.node("Add", [x, y], f"sum{index}")
        if kind == 3:
            y = net.node("MaxPool", [y], f"p{index}", kernel_shape=[3, 3], pads=[1] * 4)
        x = y
    x = net.node("GlobalAveragePool", [x], "pool")
    model = net.model(net.gemm(net.node("Flatten", [x], "flat"), "fc", 8, 5))
    pruned = prune(model, "channel", share, scope="layer", skip=["fc"], seed=seed)
    _, report = smaller(pruned, tolerance=1e-4)
    assert any(entry.removed or entry.left for entry in report.values())


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("mobilenet_v1", {"size": 32}, 0.7),
        ("mobilenet_v2", {"size": 32, "batch_norm": True}, 0.5),
        ("squeezenet", {}, 0.4),
        ("densenet121", {}, 0.4),
        ("inception_v2", {}, 0.4),
        ("shufflenet", {}, 0.0),
        ("resnet50", {}, 0.3),
    ],
)
def test_networks_of_the_zoo_shrink_and_compute_the_same(name, options, least):
    pruned = prune(zoo.build(name, **options), "channel", 0.5, scope="layer")
    small, _ = smaller(pruned)
    assert 1 - small.ByteSize() / pruned.ByteSize() >= least


def test_pruning_removes_channels_when_asked_to_and_reports_them():
    net = Net()
    model = net.model(net.conv(net.conv("x", "a", 3, 8), "b", 8, 4))
    report = prune_with_report(
        model, "channel", 0.5, scope="layer", skip=["b"], remove_channels=True
    )
    assert shapes_of(report.model)["b.weight"] == (4, 4, 1, 1)
    assert report.layers[0].layer.shape == (8, 3, 1, 1)
    assert "channels: a: 4 of 8 removed" in str(report)
    assert report.to_dict()["removed"] == [
        {"layer": "a", "channels": 8, "removed": 4, "left": 0, "reason": ""}
    ]


def test_a_loaded_model_keeps_its_shapes():
    import tvm_sparse as ts

    model = ts.load(zoo.mlp(sizes=(8, 8, 4)))
    with pytest.raises(SparseError, match="prune the file, then load it"):
        prune(model, "channel", 0.5, remove_channels=True)
