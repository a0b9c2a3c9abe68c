"""A model in half precision goes the whole way to GPUs' libraries, on a machine without a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_cuda_machine_code import pytestmark  # noqa: F401
from weights import pattern

import tvm_sparse as ts
from tvm_sparse.cli import main
from tvm_sparse.cuda_toolkit import has_gpu
from tvm_sparse.manifest import read_manifest

BATCH, CHANNELS, SIZE = 16, 64, 32
TOKENS, FEATURES, WIDE = 1024, 1024, 4096


def weights() -> dict[str, np.ndarray]:
    kernel = pattern("unstructured", CHANNELS, CHANNELS * 9).reshape(CHANNELS, CHANNELS, 3, 3)
    return {
        "conv.weight": kernel,
        "conv.bias": np.zeros(CHANNELS, np.float16),
        "up.weight": np.ascontiguousarray(pattern("2:4", WIDE, FEATURES).T),
        "down.weight": np.ascontiguousarray(pattern("tile-wise", FEATURES, WIDE).T),
        "tokens": np.array([TOKENS, FEATURES], np.int64),
    }


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """A convolution, whose result is taken as tokens, and two layers on them."""
    nodes = [
        helper.make_node(
            "Conv", ["x", "conv.weight", "conv.bias"], ["image"], name="conv", pads=[1, 1, 1, 1]
        ),
        helper.make_node("Reshape", ["image", "tokens"], ["rows"], name="reshape"),
        helper.make_node("MatMul", ["rows", "up.weight"], ["wide"], name="up"),
        helper.make_node("Relu", ["wide"], ["active"], name="relu"),
        helper.make_node("MatMul", ["active", "down.weight"], ["y"], name="down"),
    ]
    image = [BATCH, CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, image)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [TOKENS, FEATURES])],
        [numpy_helper.from_array(value, name) for name, value in weights().items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_inspection_names_types_and_patterns(model):
    layers = {layer.name: layer for layer in ts.inspect(model).layers}
    assert {layer.dtype for layer in layers.values()} == {"float16"}
    assert layers["up"].pattern == "2:4" and layers["down"].density == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("target", "arch"), [("cuda-sm80", "sm_80"), ("cuda-sm90a", "sm_90a")])
def test_a_library_holds_the_planned_kernels_for_its_architecture(model, tmp_path, target, arch):
    plan = ts.plan(model, target=target)
    kernels = {decision.name: decision.kernel for decision in plan.decisions}
    assert (kernels["up"], kernels["down"]) == ("cuda_two_four", "cuda_tile_wise")
    module = ts.compile(model, target=target, plan=plan)
    layers = {layer.name: layer for layer in module.report.layers}
    for decision in plan.decisions:
        layer = layers[decision.name]
        assert (layer.kernel, layer.reason) == (decision.kernel, decision.reason)
        assert layer.reason
    # Half of the elements and two bits for each; a quarter of the columns, and their numbers.
    dense = 2 * FEATURES * WIDE
    assert layers["up"].bytes_packed == pytest.approx(dense * (0.5 + 2 / 32), rel=0.02)
    assert layers["down"].bytes_packed == pytest.approx(dense * 0.25, rel=0.1)
    module.export(tmp_path / "model.so")
    library = (tmp_path / "model.so").read_bytes()
    assert arch.encode() in library
    for decision in plan.decisions:
        if decision.is_sparse:
            assert f"{decision.format}_{decision.op}_1_kernel".encode() in library
    assert read_manifest(tmp_path / "model.so").target["arch"] == arch


def test_the_command_line_compiles_for_a_gpu(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    onnx.save(model, tmp_path / "model.onnx")
    asked = ["compile", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "model.so")]
    assert main([*asked, "--target", "cuda-sm90", "--save-plan", str(tmp_path / "plan.json")]) == 0
    told = capsys.readouterr().out
    assert "cuda_two_four" in told
    assert has_gpu() or "MiB, not checked" in told
    assert b"sm_90" in (tmp_path / "model.so").read_bytes()
    assert ts.Plan.from_json(tmp_path / "plan.json").decision("down").kernel == "cuda_tile_wise"
