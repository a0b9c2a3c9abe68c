"""Models in float16 and bfloat16 go the whole way: planned, compiled, checked, exported, run."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from half_support import build, half_templates, template
from onnx import helper, numpy_helper
from scipy.special import erf
from tvm import relax
from tvm_sparse.passes.collect_weights import collect_weights

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.check import check_outputs, half_model_tolerance, model_tolerance
from tvm_sparse.dtypes import HALF_TYPES, numpy_dtype
from tvm_sparse.errors import CheckError, InputError, PlanError
from tvm_sparse.reference import Reference, random_inputs

HALVES = sorted(HALF_TYPES)
BERT: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64, "seq": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "matmul": ("single_matmul", {"m": 24, "k": 40, "n": 7}),
    "mlp": ("mlp", {"sizes": (16, 24, 8), "batch": "n"}),
    "bert": ("bert-base", BERT),
    "bert of opset 13": ("bert-base", {**BERT, "opset": 13}),
    "convolution": ("single_conv", {"in_channels": 4, "out_channels": 8, "size": 7}),
    "batch norm": ("mobilenet_v1", {"size": 32, "batch_norm": True}),
}


def pruned(what: str, dtype: str) -> onnx.ModelProto:
    name, options = MODELS[what]
    return ts.prune(zoo.build(name, dtype=dtype, **options), sparsity=0.8, scope="layer")


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers, computed in float32."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    for tensor in wide.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if str(value.dtype) in HALF_TYPES:
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    for value in (*wide.graph.input, *wide.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return wide


def assert_agrees(module: Any, proto: onnx.ModelProto, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    [spec] = module.inputs
    shape = [3 if isinstance(size, str) else size for size in spec.shape]
    x = rng.standard_normal(shape, np.float32).astype(numpy_dtype(spec.dtype))
    got = module(x)
    assert str(got.dtype) == spec.dtype
    [want] = Reference(ts.load(in_float32(proto))).run([x.astype(np.float32)]).outputs
    check_outputs(["output"], [got], [want], tolerance)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("what", MODELS)
def test_without_kernels_of_its_type_a_model_stays_with_tvm_and_is_right(what, dtype):
    proto = pruned(what, dtype)
    module = ts.compile(proto, threads=1)
    assert {layer.dtype for layer in module.report.layers} == {dtype}
    assert {layer.kernel for layer in module.report.layers} == {"tvm"}
    reasons = {layer.reason for layer in module.report.layers}
    assert reasons == {f"the weight is {dtype}; its kernels are for float32"}
    assert not module.report.notes
    assert_agrees(module, proto, half_model_tolerance(dtype, 0, len(module.report.layers)))


def test_such_a_layer_can_be_kept_dense_but_not_be_forced():
    proto = pruned("matmul", "float16")
    for options in ({"force": {"*": "dense"}}, {"forbid": ["*"]}):
        [decision] = ts.plan(proto, threads=1, **options).decisions
        assert (decision.kernel, decision.source) == ("tvm", "user")
    words = "cannot be register_tiled: the weight is float16; its kernels are for float32"
    with pytest.raises(PlanError, match=words):
        ts.plan(proto, threads=1, force={"*": "register_tiled"})


def test_a_plan_that_gives_it_a_kernel_of_another_type_is_refused():
    proto = pruned("matmul", "float16")
    plan = ts.plan(proto, threads=1)
    wide = ts.plan(in_float32(proto), threads=1, force={"*": "register_tiled"})
    edited = type(plan)(plan.target, plan.threads, plan.digest, wide.decisions)
    with pytest.raises(PlanError, match="the weight is float16; its kernels are for float32"):
        ts.compile(proto, plan=edited, threads=1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("what", ["matmul", "mlp", "bert"])
def test_a_kernel_of_its_type_takes_the_layer_with_its_epilogue(monkeypatch, what, dtype):
    proto = pruned(what, dtype)
    with half_templates(monkeypatch, template()):
        module = ts.compile(proto, threads=1)
    layers = module.report.layers
    assert {layer.kernel for layer in layers} == {"half_rows"}
    assert all(0 <= layer.error_share <= 1 for layer in layers)
    fused = {layer.config.get("fused", "") for layer in layers}
    assert (
        fused
        == {
            "matmul": {""},
            "mlp": {"add+maximum", "add"},
            "bert": {"add", "add+add", "add+divide+erf+add+multiply+multiply"},
        }[what]
    )
    assert_agrees(module, proto, half_model_tolerance(dtype, len(layers), 0))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_kernel_that_is_wrong_by_little_is_found(monkeypatch, dtype):
    # A thousandth of what the outputs are, which a tolerance for the type's sums would let pass.
    wrong = template(build=partial(build, off=0.05))
    with half_templates(monkeypatch, wrong), pytest.raises(CheckError, match="'linear' disagrees"):
        ts.compile(pruned("matmul", dtype), threads=1)


def test_the_reason_of_a_kernel_of_the_type_comes_before_that_of_others(monkeypatch):
    proto = pruned("convolution", "float16")
    with half_templates(monkeypatch, template()):
        [decision] = ts.plan(proto, threads=1).decisions
    assert decision.reason == "only for matrix products in rows"


def test_tuning_leaves_such_layers_alone(tmp_path):
    result = ts.tune(pruned("matmul", "float16"), records=tmp_path / "records", trials=1, threads=1)
    assert not result.records


@pytest.mark.parametrize("dtype", HALVES)
def test_a_library_takes_and_gives_the_type(tmp_path, dtype):
    module = ts.compile(pruned("mlp", dtype), threads=1)
    module.export(tmp_path / "model.so")
    loaded = ts.load_module(tmp_path / "model.so")
    assert {spec.dtype for spec in (*loaded.inputs, *loaded.outputs)} == {dtype}
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(numpy_dtype(dtype))
    assert np.array_equal(loaded(x), module(x))
    with pytest.raises(InputError, match=f"'input' is float32, and the model wants {dtype}"):
        loaded(x.astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_reference_computes_layers_in_float64_and_rounds_their_results_once(dtype):
    model = ts.load(pruned("mlp", dtype))
    run = Reference(model).run(random_inputs(model))
    for fused in collect_weights(model):
        capture = run.captures[fused.site.binding]
        assert str(capture.x.dtype) == str(capture.result.dtype) == dtype
        wide = capture.x.astype(np.float64) @ capture.weight.astype(np.float64)
        np.testing.assert_allclose(capture.y64, wide, rtol=1e-12, atol=1e-12)
        assert np.array_equal(capture.result, wide.astype(numpy_dtype(dtype)))


@pytest.mark.parametrize("dtype", HALVES)
def test_one_kernel_s_model_may_differ_by_little_and_tvm_s_own_by_more(dtype):
    kernel, other = half_model_tolerance(dtype, 1, 0), half_model_tolerance(dtype, 0, 1)
    assert model_tolerance(1) < kernel < other
    assert half_model_tolerance(dtype, 0, 0) == other
    want = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    rounded = want.astype(numpy_dtype(dtype))
    assert check_outputs(["y"], [rounded], [want], kernel)[0].ok
    with pytest.raises(CheckError):
        check_outputs(["y"], [np.roll(rounded, 1)], [want], kernel)


@pytest.mark.parametrize("kind", ["instance", "power"])
def test_what_tvm_lacks_in_bfloat16_is_computed_in_float32(kind):
    nodes = {
        "instance": [helper.make_node("InstanceNormalization", ["x", "scale", "shift"], ["y"])],
        "power": [
            helper.make_node("Abs", ["x"], ["a"]),
            helper.make_node("Pow", ["a", "exponent"], ["y"]),
        ],
    }[kind]
    values = {"scale": np.ones(3), "shift": np.zeros(3), "exponent": np.array(1.5)}
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [2, 3, 4, 5])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, [2, 3, 4, 5])],
        [
            numpy_helper.from_array(value.astype(numpy_dtype("bfloat16")), name)
            for name, value in values.items()
            if name in used
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    module = ts.compile(proto, threads=1)
    assert_agrees(module, proto, half_model_tolerance("bfloat16", 1, 0))


CHAINS = {
    "exp": lambda e, x: e(relax.op.exp(e(relax.op.astype(x, "float32")))),
    "a ReLU and tanh": lambda e, x: e(
        relax.op.tanh(e(relax.op.astype(e(relax.op.nn.relu(x)), "float32")))
    ),
    "a ReLU and GELU": lambda e, x: e(
        relax.op.nn.gelu(e(relax.op.astype(e(relax.op.nn.relu(x)), "float32")))
    ),
    "a square root": lambda e, x: e(
        relax.op.power(e(relax.op.astype(e(relax.op.abs(x)), "float32")), relax.const(1.5))
    ),
}


@pytest.mark.parametrize("what", CHAINS)
def test_float32_functions_of_bfloat16_values_are_right(what):
    # Fused with the cast before them, their polynomials once read the bits as whole numbers.
    x = relax.Var("x", relax.TensorType((5, 7), "bfloat16"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            y = builder.emit_output(CHAINS[what](builder.emit, x))
        builder.emit_func_output(y)
    value = np.random.default_rng(0).standard_normal((5, 7)).astype(numpy_dtype("bfloat16"))
    got = ts.compile(builder.get(), threads=1)(value)
    wide = value.astype(np.float64)
    want = {
        "exp": np.exp,
        "a ReLU and tanh": lambda v: np.tanh(np.maximum(v, 0)),
        "a ReLU and GELU": lambda v: np.maximum(v, 0) * (1 + erf(v / np.sqrt(2))) / 2,
        "a square root": lambda v: np.abs(v) ** 1.5,
    }[what](wide)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
