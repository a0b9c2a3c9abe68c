"""Real networks, pruned layer by layer, are compiled, checked, and agree with ONNX Runtime."""

from __future__ import annotations

import contextlib
import glob
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.pruning import prunable_layers

# Sparsities that the layers of a network take in turn.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

FAST = ("squeezenet", "shufflenet")
SLOW: dict[str, Callable[[], onnx.ModelProto]] = {
    "bert-base": lambda: zoo.bert_encoder(seq=128),
    "mobilenet_v1": lambda: zoo.mobilenet_v1(batch_norm=True),
    "mobilenet_v2": lambda: zoo.mobilenet_v2(batch_norm=True),
}


def prune_unevenly(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Prune every layer on its own, one after the other to another share."""
    names = [layer.name for layer in prunable_layers(proto)]
    for index, share in enumerate(SHARES):
        others = [n for i, n in enumerate(names) if i % len(SHARES) != index]
        if len(others) == len(names):
            continue
        skip = [glob.escape(other) for other in others]
        proto = ts.prune(proto, sparsity=share, scope="layer", skip=skip)
    return proto


def run_onnx(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feed)


def compile_and_compare(proto: onnx.ModelProto) -> Any:
    """Compile with the check on; return the report."""
    module = ts.compile(proto, "native", check=True)
    rng = np.random.default_rng(1)
    feed = {
        spec.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in spec.shape])
        .astype(np.float32)
        for spec in module.inputs
    }  # fmt: skip
    got = module.run(feed)
    for name, want in zip(got, run_onnx(proto, feed), strict=True):
        # What the ORT kernels and ours may differ by, a layer, adds up over the network.
        tolerance = 1e-6 * len(module.report.layers) + 1e-5
        assert np.isfinite(got[name]).all()
        error = np.abs(got[name] - want).max()
        assert error <= tolerance * np.abs(want).max(), (name, error)
    report = module.report
    for layer in report.layers:
        assert layer.reason
        assert layer.error_share is None or layer.error_share < 1, layer
    return report


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in zoo.LIGHT_MODELS
    ],
)
def test_a_light_network_of_mixed_sparsity_agrees_with_onnx_runtime(name):
    proto = prune_unevenly(zoo.light_model(name))
    report = compile_and_compare(proto)
    densities = {round(layer.density, 2) for layer in report.layers}
    assert min(densities) <= 0.06 and max(densities) >= 0.49
    # Nearly every convolution of shufflenet is grouped, which no sparse kernel takes.
    assert report.summary()["sparse"] >= (0 if name == "shufflenet" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_network_of_mixed_sparsity_agrees_with_onnx_runtime(name):
    report = compile_and_compare(prune_unevenly(SLOW[name]()))
    assert report.summary()["sparse"] >= 2


@pytest.mark.slow
def test_bert_base_at_ninety_percent_is_a_quarter_of_its_weights(tmp_path):
    proto = ts.prune(zoo.bert_encoder(), sparsity=0.9, scope="layer")
    module = ts.compile(proto, "native", check=False)
    place = tmp_path / "bert.so"
    module.export(place)
    assert module.report.totals["compile_seconds"] < 60
    assert place.stat().st_size < module.report.summary()["bytes_dense"] / 4


def transformer(torch: Any) -> Any:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True)
    net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for value in net.parameters():
        if value.ndim == 2:
            keep = torch.rand_like(value) < 0.1
            value.data = torch.where(keep, torch.randn_like(value) * 0.4, 0.0)
    return net


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symbolic", [False, True])
def test_a_transformer_of_torch_export_agrees_with_pytorch(symbolic):
    torch = pytest.importorskip("torch")
    net, x = transformer(torch), torch.randn(3, 10, 64)
    shapes = ({0: torch.export.Dim("batch")},) if symbolic else None
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=shapes)
        module = ts.compile(program, "native", threads=1)
        for batch in (3, 5) if symbolic else (3,):
            x = torch.randn(batch, 10, 64)
            want = net(x).numpy()
            np.testing.assert_allclose(module(x.numpy()), want, rtol=0, atol=1e-4)
    assert {layer.density < 0.2 for layer in module.report.layers} == {True}
    assert len(module.report.layers) == 8
    assert module.report.summary()["sparse"] == 8


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_transformer_of_torch_onnx_export_agrees_with_pytorch(dynamo, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    net, x = transformer(torch), torch.randn(3, 10, 64)
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        if dynamo:
            proto = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
        else:
            buffer = io.BytesIO()
            torch.onnx.export(net, (x,), buffer, dynamo=False, opset_version=14)
            proto = onnx.load_from_string(buffer.getvalue())
        want = net(x).numpy()
    module = ts.compile(proto, "native", threads=1)
    np.testing.assert_allclose(module(x.numpy()), want, rtol=0, atol=1e-4)
    assert module.report.summary()["sparse"] == 8
