"""What pruning ranks by, how sparsity grows, and which layers are left alone and why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pruning_support import gaussian, matmul_model, weights_of

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.errors import SparseError
from tvm_sparse.pruning import CubicSchedule, OneShot, prune, prune_with_report


def test_taylor_scores_cut_what_changes_the_loss_least():
    weight, gradient = gaussian(0, 16, 8), gaussian(1, 16, 8)
    for name in ("m0", "w0"):
        report = prune_with_report(
            matmul_model(weight), sparsity=0.5, scores="taylor", gradients={name: gradient}
        )
        kept = weights_of(report.model)["w0"] != 0
        loss = np.abs(weight * gradient)
        assert kept.sum() == 64
        assert loss[kept].min() >= loss[~kept].max()
        assert report.scores == "taylor"


def test_wanda_scores_weigh_by_the_norm_of_the_input_within_each_output():
    weight, x = gaussian(0, 16, 8), gaussian(1, 32, 16) * np.linspace(0.1, 4, 16, dtype="float32")
    pruned = prune(matmul_model(weight), sparsity=0.5, scores="wanda", calibration={"x0": x})
    score = np.abs(weight) * np.linalg.norm(x, axis=0)[:, None]
    kept = weights_of(pruned)["w0"] != 0
    assert (kept.sum(axis=0) == 8).all()
    ranks = np.argsort(np.argsort(-score, axis=0), axis=0)
    assert np.array_equal(kept, ranks < 8)
    batches = [{"x0": x[:10]}, {"x0": x[10:]}]
    again = prune(matmul_model(weight), sparsity=0.5, scores="wanda", calibration=batches)
    assert np.array_equal(weights_of(again)["w0"], weights_of(pruned)["w0"])


def conv_model(weight: np.ndarray, groups: int, **attributes: object) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=groups, **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, [2, 4, 9, 9])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def tap_norms(x: np.ndarray, stride: int, pad: int, dilation: int) -> np.ndarray:
    """Norms of what each tap of a 3x3 kernel reads, one output at a time: [channels, 3, 3]."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    outputs = (padded.shape[2] - 2 * dilation - 1) // stride + 1
    sums = np.zeros((x.shape[1], 3, 3))
    for i in range(outputs):
        for j in range(outputs):
            rows = [i * stride + tap * dilation for tap in range(3)]
            columns = [j * stride + tap * dilation for tap in range(3)]
            sums += (padded[:, :, rows][:, :, :, columns] ** 2).sum(axis=0)
    return np.sqrt(sums)


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
@pytest.mark.parametrize(
    ("stride", "pad", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 1, 1), (1, 2, 2, 2)]
)
def test_wanda_norms_are_those_of_what_a_tap_reads(
    monkeypatch, runtime, stride, pad, dilation, groups
):
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    weight, x = gaussian(0, 4, 4 // groups, 3, 3), gaussian(1, 2, 4, 9, 9)
    attributes = {"strides": [stride] * 2, "pads": [pad] * 4, "dilations": [dilation] * 2}
    model = conv_model(weight, groups, **attributes)
    monkeypatch.setattr(
        "tvm_sparse.pruning.activations.has_onnxruntime", lambda: runtime == "onnxruntime"
    )
    pruned = prune(model, sparsity=0.5, scores="wanda", calibration={"x": x})
    norms = tap_norms(x, stride, pad, dilation)
    kept = weights_of(pruned)["w"] != 0
    for out in range(4):
        first = out // (4 // groups) * (4 // groups)
        score = np.abs(weight[out]) * norms[first : first + 4 // groups]
        assert (~kept[out]).sum() == round(score.size / 2)
        assert score[kept[out]].min() >= score[~kept[out]].max()


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_wanda_follows_padding_that_depends_on_the_input(auto_pad):
    pytest.importorskip("onnxruntime")
    weight, x = gaussian(0, 4, 4, 3, 3), gaussian(1, 2, 4, 9, 9)
    model = conv_model(weight, 1, auto_pad=auto_pad)
    explicit = conv_model(weight, 1, pads=[0 if auto_pad == "VALID" else 1] * 4)
    options = {"sparsity": 0.5, "scores": "wanda", "calibration": {"x": x}}
    pruned, wanted = (weights_of(prune(m, **options))["w"] for m in (model, explicit))
    assert np.array_equal(pruned, wanted)


def test_wanda_prunes_a_loaded_model_as_it_prunes_its_file():
    pytest.importorskip("onnxruntime")
    proto = zoo.mlp(sizes=(16, 12, 6))
    options = {"sparsity": 0.5, "scores": "wanda", "calibration": {"input": gaussian(0, 1, 16)}}
    loaded = prune(ts.load(proto), **options)
    plain = ts.load(prune(proto, **options))
    assert loaded.digest() == plain.digest()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scores": "random"}, "unknown scores 'random'; there are magnitude"),
        ({"scores": "taylor"}, "'taylor' and gradients go together"),
        ({"gradients": {}}, "'taylor' and gradients go together"),
        ({"scores": "wanda"}, "'wanda' and calibration inputs go together"),
        ({"scores": "taylor", "gradients": {"other": 1}}, "no gradient for layer 'm0'"),
        ({"scores": "taylor", "gradients": {"m0": np.ones(3)}}, "the gradient of 'm0' has shape"),
        ({"scores": "wanda", "calibration": {"z": np.ones(3)}}, "lack 'x0'"),
        ({"scores": "wanda", "calibration": []}, "there are no calibration inputs"),
        ({"scores": "wanda", "calibration": {"x0": np.ones(3)}}, "do not fit the model"),
        ({"pattern": "channel", "scope": "row"}, "channel cuts across rows"),
    ],
)
def test_scores_that_lack_something_are_refused_in_words(options, words):
    with pytest.raises(SparseError, match=words):
        prune(matmul_model(gaussian(0, 8, 8)), sparsity=0.5, **options)


def test_a_cubic_schedule_grows_fast_at_first_and_ends_where_it_should():
    schedule = CubicSchedule(0.9, steps=10, start=5, initial=0.1)
    assert [schedule.at(step) for step in (0, 5, 15, 99)] == pytest.approx([0.1, 0.1, 0.9, 0.9])
    assert schedule.at(10) == pytest.approx(0.9 - 0.8 * 0.5**3)
    growth = np.diff([schedule.at(step) for step in range(5, 16)])
    assert (growth > 0).all()
    assert (np.diff(growth) < 0).all()
    assert [OneShot(0.5, start=3).at(step) for step in (2, 3)] == [0.0, 0.5]
    with pytest.raises(SparseError, match="from 0 to below 1"):
        CubicSchedule(1.0, steps=3)
    with pytest.raises(SparseError, match="at least one step"):
        CubicSchedule(0.5, steps=0)


def test_kinds_of_layers_are_chosen_by_the_pattern_and_the_others_named():
    net = zoo.mobilenet_v1(size=32)
    filters = prune_with_report(net, "filter", 0.5)
    assert filters.kept == {"classifier": "it is no convolution; 'filter' prunes those only"}
    neurons = prune_with_report(net, "neuron", 0.5)
    assert [cut.layer.name for cut in neurons.layers] == ["classifier"]
    kernels = prune_with_report(net, "kernel", 0.5)
    assert kernels.kept == {"classifier": "it has no kernels; 'kernel' is for convolutions"}
    tiles = prune_with_report(net, "tile-wise:16", 0.5)
    assert set(tiles.kept) == {f"block{i}/depthwise" for i in range(1, 14)}
    assert tiles.sparsity == pytest.approx(0.5, abs=0.002)


def quantised(weight: np.ndarray, *operators: str) -> onnx.ModelProto:
    """A matmul and, beside it, one whose weight passes through `operators`."""
    model = matmul_model(np.zeros((8, 8), np.float32), gaussian(1, 8, 8))
    graph = model.graph
    graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w0"))
    graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
    name = "w0"
    for index, operator in enumerate(operators):
        node = helper.make_node(operator, [name, "scale", "zero"], [f"q{index}"])
        graph.node.insert(index, node)
        name = f"q{index}"
    next(node for node in graph.node if node.name == "m0").input[1] = name
    return model


@pytest.mark.parametrize(
    ("weight", "operators"),
    [
        (np.ones((8, 8), np.int8), ["DequantizeLinear"]),
        (gaussian(0, 8, 8), ["QuantizeLinear", "DequantizeLinear"]),
    ],
)
def test_a_weight_behind_a_quantiser_stays_and_all_reports_say_so(weight, operators):
    model = quantised(weight, *operators)
    report = prune_with_report(model, sparsity=0.5)
    assert report.kept == {
        "m0": "its weight is quantised (behind a DequantizeLinear); prune before quantising"
    }
    [note] = ts.inspect(model).notes
    assert note.startswith("'m0' keeps its quantised weight (behind a DequantizeLinear)")


def test_an_operator_on_integers_is_named():
    model = matmul_model(gaussian(0, 8, 8))
    weight = numpy_helper.from_array(np.ones((8, 8), np.int8), "integers")
    model.graph.initializer.append(weight)
    x = helper.make_tensor_value_info("xq", TensorProto.INT8, ["n", 8])
    model.graph.input.append(x)
    node = helper.make_node("MatMulInteger", ["xq", "integers"], ["yq"], name="quantised")
    model.graph.node.append(node)
    assert prune_with_report(model, sparsity=0.5).kept == {
        "quantised": "its weight is quantised (MatMulInteger); prune before quantising"
    }
