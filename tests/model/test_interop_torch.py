"""PyTorch's own pruning, for real: exported programs, both ONNX exporters, and checkpoints."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import tvm_sparse as ts
from tvm_sparse.frontends.checkpoint import open_checkpoint
from tvm_sparse.frontends.onnx_overlay import with_weights
from tvm_sparse.model import Model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def network(seed: int) -> Any:
    """A convolution, three linear layers in four dimensions (a square one, too), and one in two."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)
            sizes = ((6, 24), (24, 24), (24, 6))
            self.layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in sizes)
            self.fc = torch.nn.Linear(48, 10)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.conv(x))
            for layer in self.layers:
                y = torch.relu(layer(y))
            return self.fc(y.mean(3).flatten(1))

    torch.manual_seed(seed)
    return Net().eval()


def pruned(net: Any, amount: float = 0.8) -> Any:
    """PyTorch's own pruning, not made permanent."""
    from torch.nn.utils import prune

    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount)
    return net


def answer(net: Any) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(X)).numpy()


def to_onnx(net: Any, newer: bool) -> onnx.ModelProto:
    args = (torch.from_numpy(X),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if newer:
            pytest.importorskip("onnxscript")
            return torch.onnx.export(net, args, dynamo=True, verbose=False).model_proto
        file = io.BytesIO()
        torch.onnx.export(net, args, file, dynamo=False, do_constant_folding=True)
        return onnx.load_from_string(file.getvalue())


def zeros(model: Model) -> list[float]:
    return [round(1 - layer.density, 1) for layer in ts.inspect(model).layers]


def check(model: Model, net: Any) -> None:
    wanted = answer(net)
    np.testing.assert_allclose(ts.compile(model)(X), wanted, rtol=0, atol=1e-5)


def test_an_exported_program_keeps_no_mask_of_torchs_prune():
    net = pruned(network(0))
    model = ts.load(torch.export.export(net, (torch.from_numpy(X),)))
    names = [layer.name for layer in ts.inspect(model).layers]
    assert names == ["conv", "layers.0", "layers.1", "layers.2", "fc"]
    assert zeros(model) == [0.8] * 5
    check(model, net)


def test_an_exported_program_keeps_no_mask_of_a_parametrization():
    net = network(0)
    ts.prune_module(net, sparsity=0.8, scope="layer")
    model = ts.load(torch.export.export(net, (torch.from_numpy(X),)))
    assert zeros(model) == [0.8] * 5
    check(model, net)


def test_a_large_mask_that_scores_decide_is_folded():
    class Threshold(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scores", torch.rand(300, 300))

        def forward(self, weight: Any) -> Any:
            return torch.where(self.scores > 0.8, weight, torch.zeros_like(weight))

    net = torch.nn.Linear(300, 300).eval()
    torch.nn.utils.parametrize.register_parametrization(net, "weight", Threshold())
    model = ts.load(torch.export.export(net, (torch.randn(2, 300),)))
    assert zeros(model) == [0.8]


@pytest.mark.parametrize("newer", [False, True])
def test_an_onnx_file_of_a_network_with_masks_shows_its_zeros(newer):
    net = pruned(network(0))
    model = ts.load(to_onnx(net, newer))
    assert zeros(model) == [0.8] * 5
    check(model, net)


@pytest.mark.parametrize("newer", [False, True])
def test_checkpoints_fit_what_the_exporters_wrote(newer, tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    proto, other = to_onnx(network(0), newer), pruned(network(1))
    safetensors.save_file(other.state_dict(), tmp_path / "pruned.safetensors")
    model = ts.load(proto, weights=tmp_path / "pruned.safetensors")
    assert zeros(model) == [0.8] * 5
    check(model, other)
    laid, _ = with_weights(proto, tmp_path / "pruned.safetensors")
    session = onnxruntime.InferenceSession(laid.SerializeToString())
    [actual] = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(actual, answer(other), rtol=0, atol=1e-5)


def test_an_exported_program_takes_a_state_dict_and_forgets_its_own_masks():
    net, other = pruned(network(0)), network(1)
    program = torch.export.export(net, (torch.from_numpy(X),))
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    check(ts.load(program, weights=other.state_dict()), other)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict.items())
    check(ts.load(program), net)


def test_statistics_of_batchnorms_come_from_the_checkpoint():
    def normed(seed: int) -> Any:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        return net

    program = torch.export.export(normed(0), (torch.from_numpy(X),))
    check(ts.load(program, weights=normed(1).state_dict()), normed(1))


def test_masks_of_prune_module_are_read_from_a_state_dict():
    net = network(0)
    ts.prune_module(net, sparsity=0.5, scope="layer")
    entries = open_checkpoint(net.state_dict()).entries
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            found = entries[f"{name}.weight"]
            assert not found.is_mask
            assert np.array_equal(found.read(), module.weight.detach().numpy())


def test_tensors_of_bfloat16_are_taken_without_loss():
    value = torch.randn(3, 4, dtype=torch.bfloat16)
    found = open_checkpoint({"a.weight": value}).entries["a.weight"].read()
    assert np.array_equal(found, value.float().numpy())
