"""Whole models: they agree with ONNX Runtime, are checked, exported, loaded and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from dense_support import WIDTHS, features
from onnx import TensorProto, helper, numpy_helper
from tvm_sparse.schedules.lookup import DENSE_FORMATS
from tvm_sparse.schedules.x86.templates import TEMPLATES

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.errors import CheckError, ModelError, PlanError
from tvm_sparse.formats import FORMATS
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, Workload

V3 = "x86-64-v3"


def pruned(proto: onnx.ModelProto, sparsity: float = 0.9) -> onnx.ModelProto:
    return ts.prune(proto, sparsity=sparsity, scope="layer")


def feeds(module: Any, sizes: dict[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_normal([(sizes or {}).get(d, d) for d in spec.shape], np.float32)
        for spec in module.inputs
    }


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def assert_agrees(
    module: Any, proto: onnx.ModelProto, sizes: dict[str, int] | None = None, seed: int = 0
) -> None:
    feed = feeds(module, sizes, seed)
    got = module.run(feed)
    for name, want in zip(got, session(proto).run(None, feed), strict=True):
        assert got[name].shape == want.shape
        np.testing.assert_allclose(got[name], want, rtol=0, atol=2e-5 * np.abs(want).max() + 1e-7)


class Graph:
    """Convolutional graphs, node by node."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        spread = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
        value = (self.rng.standard_normal(shape) * spread).astype(np.float32)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(
        self, x: str, inputs: int, outputs: int, kernel: int = 3, groups: int = 1, **more: Any
    ) -> str:
        weight = self.weight(outputs, inputs // groups, kernel, kernel)
        pads = [kernel // 2] * 4
        bias = self.weight(outputs)
        return self.op("Conv", x, weight, bias, group=groups, pads=pads, **more)

    def close(self, y: str, channels: int, size: int, batch: Any = 1) -> onnx.ModelProto:
        shape = (batch, channels, size, size)
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
            self.weights,
        )
        opset = [helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opset, ir_version=8)


def residual_block(batch: Any = 1) -> onnx.ModelProto:
    """As in ResNet: stride two, a projection beside it, additions, ReLU."""
    g = Graph()
    x = g.op("Relu", g.conv("x", 8, 16))
    y = g.op("Relu", g.conv(x, 16, 24, strides=[2, 2]))
    y = g.conv(y, 24, 24)
    y = g.op("Relu", g.op("Add", y, g.conv(x, 16, 24, kernel=1, strides=[2, 2])))
    z = g.conv(g.op("Relu", g.conv(y, 24, 24)), 24, 24)
    return g.close(g.op("Relu", g.op("Add", z, y)), 8, 14, batch)


def inverted_residual() -> onnx.ModelProto:
    """As in MobileNetV2: expand, depthwise, project, add; ReLU6."""
    g = Graph()
    for name, value in (("low", 0.0), ("high", 6.0)):
        g.weights.append(numpy_helper.from_array(np.float32(value), name))
    y = g.op("Clip", g.conv("x", 16, 48, kernel=1), "low", "high")
    y = g.op("Clip", g.conv(y, 48, 48, groups=48), "low", "high")
    y = g.op("Add", g.conv(y, 48, 16, kernel=1), "x")
    y = g.op("Clip", g.conv(y, 16, 32, kernel=1), "low", "high")
    y = g.op("Clip", g.conv(y, 32, 32, groups=32, strides=[2, 2]), "low", "high")
    return g.close(g.conv(y, 32, 20, kernel=1), 16, 15)


def grouped() -> onnx.ModelProto:
    g = Graph()
    y = g.op("Relu", g.conv("x", 12, 24, groups=3))
    return g.close(g.conv(y, 24, 10), 12, 9)


def squeeze_and_excite() -> onnx.ModelProto:
    """The gate has one value a channel, known only when it runs."""
    g = Graph()
    y = g.op("Relu", g.conv("x", 8, 32))
    gate = g.op("GlobalAveragePool", y)
    gate = g.op("Relu", g.conv(gate, 32, 8, kernel=1))
    gate = g.op("Sigmoid", g.conv(gate, 8, 32, kernel=1))
    return g.close(g.conv(g.op("Mul", y, gate), 32, 8), 8, 10)


CONVOLUTIONAL = {
    "residual block": residual_block,
    "inverted residual": inverted_residual,
    "grouped": grouped,
    "squeeze and excite": squeeze_and_excite,
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolutional_block_agrees_with_onnx_runtime(name):
    proto = pruned(CONVOLUTIONAL[name]())
    module = ts.compile(proto, "native", threads=1)
    assert_agrees(module, proto)


def test_convolutions_of_a_symbolic_batch_agree_at_every_size():
    proto = pruned(residual_block("batch"))
    module = ts.compile(proto, "native", threads=1)
    for batch in (1, 3):
        assert_agrees(module, proto, {"batch": batch})


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_an_mlp_agrees_with_onnx_runtime(batch):
    proto = pruned(zoo.mlp(batch, (100, 130, 70, 10)))
    assert_agrees(ts.compile(proto, "native", threads=1), proto)


def test_one_module_takes_every_size_of_a_symbolic_batch():
    proto = pruned(zoo.mlp("batch", (100, 130, 10)))
    module = ts.compile(proto, "native", threads=1)
    assert module.inputs[0].shape == ("batch", 100)
    for batch in (1, 2, 7, 16, 17, 64, 65, 130):
        assert_agrees(module, proto, {"batch": batch}, seed=batch)


def test_a_shape_fixes_a_symbolic_batch():
    proto = pruned(zoo.mlp("batch", (100, 130, 10)))
    module = ts.compile(proto, "native", threads=1, shapes={"input": (4, 100)})
    assert module.inputs[0].shape == (4, 100)
    assert_agrees(module, proto)


SMALL_BERT: dict[str, Any] = {"layers": 1, "hidden": 64, "heads": 4, "ffn": 128}


@pytest.mark.parametrize("opset", [11, 17])
def test_a_transformer_layer_agrees_with_onnx_runtime(opset):
    proto = pruned(zoo.bert_encoder(**SMALL_BERT, seq=24, opset=opset))
    module = ts.compile(proto, "native", threads=1)
    assert_agrees(module, proto)
    fused = [(layer.config or {}).get("fused", "") for layer in module.report.layers]
    assert sum("gelu" in text for text in fused) == 1


def test_a_transformer_layer_of_symbolic_batch_and_sequence_agrees_at_every_size():
    proto = pruned(zoo.bert_encoder(**SMALL_BERT, symbolic=True))
    module = ts.compile(proto, "native", threads=1)
    for batch, seq in ((1, 1), (2, 24), (3, 17)):
        assert_agrees(module, proto, {"batch": batch, "seq": seq})


@pytest.mark.parametrize("target", ["native", "x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_every_x86_level_that_runs_here_agrees(target):
    needs = {mcpu: feature for mcpu, feature in WIDTHS.values()}.get(target)
    if needs and needs not in features():
        pytest.skip(f"this processor lacks {needs}")
    proto = pruned(zoo.mlp(20, (50, 70, 30)))
    assert_agrees(ts.compile(proto, target, threads=1), proto)
    proto = pruned(residual_block())
    assert_agrees(ts.compile(proto, target, threads=1), proto)


def test_two_threads_compute_what_one_does():
    proto = pruned(zoo.mlp(64, (512, 768, 512)))
    results = []
    for threads in (1, 2):
        module = ts.compile(proto, V3, threads=threads)
        assert module.report.threads == threads
        results.append(module(feeds(module)["input"]))
        assert_agrees(module, proto)
    used = {(layer.config or {}).get("threads") for layer in module.report.layers}
    assert 2 in used
    np.testing.assert_allclose(*results, rtol=0, atol=1e-4 * np.abs(results[0]).max())


CONV = Workload("conv2d", Conv2dGeometry(1, 8, 12, 12, 8, (3, 3)))
# Kernels of some formats are for matrix products only.
FORMATS_HERE = {
    template.format
    for template in TEMPLATES
    if template.supports(CONV, machine_of(resolve_target(V3), 1))
} - DENSE_FORMATS | {"dense"}


@pytest.mark.parametrize("weight_format", sorted(FORMATS_HERE))
def test_every_format_can_be_forced_on_a_whole_model(weight_format):
    proto = pruned(residual_block(), 0.7)
    plan = ts.plan(proto, V3, threads=1, force={"*": weight_format})
    module = ts.compile(proto, V3, plan)
    assert_agrees(module, proto)
    assert {layer.format for layer in module.report.layers} == {weight_format}
    assert {layer.source for layer in module.report.layers} == {"user"}


def test_layers_left_to_tvm_agree_too():
    proto = pruned(zoo.mlp(8, (40, 50, 20)))
    plan = ts.plan(proto, V3, threads=1)
    plan = replace(
        plan,
        decisions=tuple(
            replace(d, format="dense", kernel="tvm", config={}) for d in plan.decisions
        ),
    )
    module = ts.compile(proto, V3, plan)
    assert_agrees(module, proto)
    assert not any(layer.is_sparse for layer in module.report.layers)


def test_empty_and_full_weights_agree():
    proto = pruned(zoo.mlp(5, (40, 50, 20)))
    for index, tensor in enumerate(proto.graph.initializer):
        value = numpy_helper.to_array(tensor)
        if value.ndim == 2:
            filler = np.zeros_like(value) if index % 2 else np.full_like(value, 0.01)
            tensor.CopyFrom(numpy_helper.from_array(filler, tensor.name))
    for force in ("register_tiled", "dense"):
        plan = ts.plan(proto, V3, threads=1, force={"*": force})
        assert_agrees(ts.compile(proto, V3, plan), proto)


# --- plans


MLP = pruned(zoo.mlp(16, (64, 96, 32)))


def edited(plan: ts.Plan, number: int = 0, **changes: Any) -> ts.Plan:
    """Edit one layer as a user does: in the JSON."""
    data = json.loads(plan.to_json())
    data["decisions"][number].update(changes)
    return ts.Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("changes", [{"mr": 2}, {"nt": 1}, {"kb": 16}, {"parts": 2, "threads": 2}])
def test_a_configuration_edited_by_hand_is_built_and_agrees(changes):
    plan = ts.plan(MLP, V3, threads=2, force={"*": "register_tiled"})
    config = {**plan.decisions[0].config, **changes}
    config["multiple"] = config["mr"] * 8
    module = ts.compile(MLP, V3, edited(plan, config=config))
    assert module.report.layers[0].config.items() >= config.items()
    assert_agrees(module, MLP)


def test_a_layer_edited_to_dense_is_dense_and_agrees():
    plan = ts.plan(MLP, V3, threads=1, force={"*": "register_tiled"})
    module = ts.compile(MLP, V3, edited(plan, 1, format="dense", kernel="tvm", config={}))
    assert [layer.format for layer in module.report.layers] == ["register_tiled", "dense"]
    assert_agrees(module, MLP)


def test_a_plan_is_read_from_a_file(tmp_path):
    place = tmp_path / "plan.json"
    plan = ts.plan(MLP, V3, threads=1, force={"fc1": "register_tiled"}, forbid=["fc2"])
    plan.to_json(place)
    module = ts.compile(MLP, V3, place)
    assert [layer.source for layer in module.report.layers] == ["user", "user"]


def test_a_plan_for_another_model_is_refused():
    plan = ts.plan(pruned(zoo.mlp(16, (64, 96, 32), seed=1)), V3, threads=1)
    with pytest.raises(PlanError, match="made for another model: its weights differ"):
        ts.compile(MLP, V3, plan)


def test_a_plan_for_another_target_is_refused():
    plan = ts.plan(MLP, "x86-64-v2", threads=1)
    with pytest.raises(PlanError, match=r"made for the target .*x86-64-v2.* not for .*x86-64-v3"):
        ts.compile(MLP, V3, plan)


def test_a_plan_that_misspells_a_layer_is_refused():
    plan = ts.plan(MLP, V3, threads=1)
    with pytest.raises(PlanError, match="a layer 'fc9', which this model lacks"):
        ts.compile(MLP, V3, edited(plan, name="fc9"))


def test_a_plan_that_lacks_a_layer_is_refused():
    plan = ts.plan(MLP, V3, threads=1)
    with pytest.raises(PlanError, match="no layer 'fc1'"):
        ts.compile(MLP, V3, replace(plan, decisions=plan.decisions[1:]))


@pytest.mark.parametrize("config", [{"mr": 0}, {"mr": "x"}, {"nt": 0}, {"kb": -3}, {"kb": 33}])
def test_a_configuration_that_cannot_be_built_names_its_layer(config):
    plan = ts.plan(MLP, V3, threads=1, force={"*": "register_tiled"})
    broken = edited(plan, config={**plan.decisions[0].config, **config})
    with pytest.raises(PlanError, match=f"layer 'fc1'.*'{next(iter(config))}'"):
        ts.compile(MLP, V3, broken)


def test_a_kernel_that_cannot_take_the_layer_is_refused():
    plan = ts.plan(MLP, V3, threads=1)
    config = {"mr": 8, "groups": 1, "threads": 1}
    wrong = edited(plan, format="dense", kernel="gemv", config=config)
    with pytest.raises(PlanError, match="'fc1' cannot run on 'gemv': only for 1 to 8 tokens"):
        ts.compile(MLP, V3, wrong)


def test_a_pattern_that_fits_no_layer_is_refused():
    with pytest.raises(PlanError, match=r"no layer is called 'encoder\.\*'"):
        ts.plan(MLP, V3, threads=1, forbid=["encoder.*"])


# --- the check


def corrupt(monkeypatch, weight_format: str) -> None:
    kind = type(FORMATS[weight_format])
    original = kind.pack

    def pack(self: Any, weight: np.ndarray, config: Any) -> Any:
        packed = original(self, weight, config)
        if weight.shape == (32, 96):
            values = packed.arrays["values"]
            values[np.flatnonzero(values)[0]] *= -1.5
        return packed

    monkeypatch.setattr(kind, "pack", pack)


@pytest.mark.parametrize("weight_format", ["register_tiled", "dense"])
def test_one_wrong_value_of_a_packed_weight_is_caught_and_its_layer_named(
    monkeypatch, weight_format
):
    plan = ts.plan(MLP, V3, threads=1, force={"*": weight_format})
    ts.compile(MLP, V3, plan)
    corrupt(monkeypatch, weight_format)
    with pytest.raises(CheckError, match="layer 'fc2' disagrees with the dense reference"):
        ts.compile(MLP, V3, plan)


def test_without_a_check_the_report_says_so(monkeypatch):
    corrupt(monkeypatch, "register_tiled")
    plan = ts.plan(MLP, V3, threads=1, force={"*": "register_tiled"})
    report = ts.compile(MLP, V3, plan, check=False).report
    assert any("not checked" in note for note in report.notes)
    assert all(layer.error is None for layer in report.layers)


# --- the report, the library


def test_the_report_tells_of_every_layer_what_became_of_it_and_why():
    proto = pruned(inverted_residual())
    report = ts.compile(proto, V3, threads=1).report
    assert len(report.layers) == 6
    for layer in report.layers:
        assert layer.reason
        assert layer.source == "model"
        assert layer.kernel
        assert layer.expected_us > 0
        assert 0 <= layer.error_share < 1
        assert layer.bytes_packed > 0
    depthwise = [layer for layer in report.layers if layer.shape[1] == 1]
    assert all("depthwise" in layer.reason for layer in depthwise)
    fused = [layer.config.get("fused", "") for layer in report.layers]
    assert fused == [
        "add+maximum+minimum",
        "add+maximum+minimum",
        "add+add",
        "add+maximum+minimum",
        "add+maximum+minimum",
        "add",
    ]
    assert report.totals["compile_seconds"] > 0


def test_the_report_shows_what_was_considered_and_where_the_zeros_are():
    report = ts.compile(pruned(inverted_residual()), V3, threads=1, check=False).report
    assert report.ceilings.gflops > report.ceilings.memory_gbytes > 0
    for layer in report.layers:
        best = min(layer.candidates, key=lambda tried: tried.us)
        assert best.us <= layer.expected_us and not best.measured
        assert layer.kernel in {tried.kernel for tried in layer.candidates}
        assert not set(layer.refusals) & {tried.format for tried in layer.candidates}
        assert all(layer.refusals.values())
        assert layer.bound_by
        assert layer.operations >= 2 * layer.nnz
        assert layer.bytes_moved > layer.bytes_packed
        rows = layer.shape[0]
        assert (layer.spy.height, layer.spy.width) == (rows, np.prod(layer.shape) // rows)
        assert sum(map(bool, layer.spy.levels())) == layer.nnz
        moved = layer.packed_spy is not None
        assert moved == layer.is_sparse
        if moved:
            assert sum(map(bool, layer.packed_spy.levels())) == layer.nnz


def test_queries_keys_and_values_that_are_packed_as_one_share_a_picture():
    proto = pruned(zoo.bert_encoder(layers=1, hidden=64, heads=2, ffn=128, seq=32))
    layers = ts.compile(proto, V3, threads=1, check=False).report.layers
    together = [layer for layer in layers if layer.packed_with]
    assert len(together) == 3
    assert len({layer.packed_spy for layer in together}) == 1
    assert len({layer.spy for layer in together}) == 3
    names = {layer.name for layer in together}
    assert all({layer.name, *layer.packed_with} == names for layer in together)


def test_pictures_stay_small_however_many_layers_there_are(monkeypatch):
    monkeypatch.setattr("tvm_sparse.layer_details.ALL_CELLS", 12 * 50)
    for layer in ts.compile(pruned(inverted_residual()), V3, threads=1, check=False).report.layers:
        for picture in filter(None, (layer.spy, layer.packed_spy)):
            assert picture.height * picture.width <= 50


def test_a_pruned_model_shrinks_in_the_report_and_in_the_library(tmp_path):
    proto = pruned(zoo.mlp(16, (512, 1024, 512)))
    module = ts.compile(proto, V3, threads=1)
    summary = module.report.summary()
    assert summary["sparse"] == 2
    assert summary["bytes_packed"] < summary["bytes_dense"] / 4
    place = tmp_path / "model.so"
    module.export(place)
    assert place.stat().st_size < summary["bytes_dense"] / 4


def test_a_library_computes_bit_for_bit_what_the_module_did(tmp_path):
    proto = pruned(residual_block("batch"))
    module = ts.compile(proto, "native", threads=1)
    place = tmp_path / "model.so"
    module.export(place)
    loaded = ts.load_module(place)
    for batch in (1, 2):
        feed = feeds(module, {"batch": batch})
        for name, value in module.run(feed).items():
            np.testing.assert_array_equal(loaded.run(feed)[name], value)
    assert loaded.report == module.report.without_pictures()
    assert loaded.inputs == module.inputs


def test_compiling_says_nothing_on_the_terminal(capfd):
    ts.compile(MLP, V3, threads=1)
    assert capfd.readouterr() == ("", "")


def test_the_source_is_not_changed():
    proto = pruned(residual_block())
    before = proto.SerializeToString()
    model = ts.load(proto)
    digest = model.digest()
    ts.compile(model, V3, threads=1)
    assert proto.SerializeToString() == before
    assert model.digest() == digest


def test_equal_layers_share_one_kernel():
    proto = pruned(zoo.mlp(16, (64, 64, 64, 64, 10)))
    plan = ts.plan(proto, V3, threads=1, force={"*": "register_tiled"})
    kernels = ts.compile(proto, V3, plan).manifest.kernels
    assert sorted(map(len, kernels.values())) == [1, 3]


def test_a_model_without_weights_is_compiled_as_it_is():
    g = Graph()
    proto = g.close(g.op("Softmax", g.op("Relu", "x")), 4, 6)
    module = ts.compile(proto, V3, threads=1)
    assert module.report.layers == ()
    assert_agrees(module, proto)


def test_a_source_that_is_no_model_is_refused():
    with pytest.raises(ModelError, match="cannot load a int"):
        ts.compile(3)
