"""The nine networks of the onnx package, and ONNX files as PyTorch writes them."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from tvm import relax
from tvm_sparse.passes.canonicalize import check_canonical
from tvm_sparse.passes.rewrite_main import bindings_of, main_of

from tvm_sparse.frontends.loading import load
from tvm_sparse.model import Model

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"

# Name -> convolutions, matmuls.
NETWORKS = {
    "bvlc_alexnet": (5, 3),
    "densenet121": (121, 0),
    "inception_v1": (57, 1),
    "inception_v2": (69, 1),
    "resnet50": (53, 1),
    "shufflenet": (49, 1),
    "squeezenet": (26, 0),
    "vgg19": (16, 3),
    "zfnet512": (5, 3),
}


def ops_of(model: Model) -> list[str]:
    values = [binding.value for binding in bindings_of(main_of(model.mod))]
    return [v.op.name.removeprefix("relax.") for v in values if isinstance(v, relax.Call)]


def run_model(model: Model, *inputs: np.ndarray) -> np.ndarray:
    executable = tvm.compile(model.mod, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    arrays = [*inputs, *model.params.values()]
    return machine["main"](*[tvm.runtime.tensor(array) for array in arrays]).numpy()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_light_networks_become_canonical(name):
    model = load(LIGHT / f"light_{name}.onnx")
    assert check_canonical(model) == []
    ops = ops_of(model)
    assert (ops.count("nn.conv2d"), ops.count("matmul")) == NETWORKS[name]
    assert not {"nn.batch_norm", "nn.dropout", "stack", "broadcast_to"} & set(ops)


def test_resnet50_loads_in_seconds():
    start = time.process_time()
    load(LIGHT / "light_resnet50.onnx")
    # About 0.7 s on a quiet machine; TVM's own constant folding takes 10 to 15 s.
    assert time.process_time() - start < 5


def test_squeezenet_computes_what_onnx_runtime_computes():
    model = onnx.load(LIGHT / "light_squeezenet.onnx")
    rng = np.random.default_rng(0)
    shapes = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for item in model.graph.node:
        if item.op_type == "ConstantOfShape":
            shape = tuple(int(size) for size in shapes[item.input[0]])
            spread = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.05
            value = (rng.standard_normal(shape) * spread).astype(np.float32)
            item.op_type = "Constant"
            del item.input[:], item.attribute[:]
            item.attribute.append(
                onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(value))
            )
    x = rng.standard_normal((1, 3, 224, 224)).astype(np.float32)
    name = next(v.name for v in model.graph.input if v.name not in shapes)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = session.run(None, {name: x})[0]
    actual = run_model(load(model), x)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-7)


def export(net: Any, x: Any, dynamo: bool) -> onnx.ModelProto:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        if dynamo:
            dims = ({0: torch.export.Dim("batch")},)
            return torch.onnx.export(
                net, (x,), dynamo=True, dynamic_shapes=dims, verbose=False
            ).model_proto
        buffer = io.BytesIO()
        torch.onnx.export(
            net, (x,), buffer, dynamo=False, opset_version=14, dynamic_axes={"x": {0: "batch"}},
            input_names=["x"],
        )  # fmt: skip
        return onnx.load_from_string(buffer.getvalue())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_a_transformer_that_pytorch_wrote_as_onnx(dynamo, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    net = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.3)
    x = torch.randn(2, 6, 32)
    model = load(export(net, x, dynamo))
    assert check_canonical(model) == []
    ops = ops_of(model)
    assert ops.count("nn.layer_norm") == 4
    assert sum(value.ndim == 2 for value in model.params.values()) == 8
    assert model.inputs[0].shape == ("batch", 6, 32)
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(run_model(model, x.numpy()), expected, rtol=0, atol=2e-5)
