"""Programs of torch.export: module paths as layer names, and PyTorch's own numbers."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_sparse.passes.canonicalize import check_canonical
from tvm_sparse.passes.rewrite_main import bindings_of, main_of

from tvm_sparse.errors import ModelError
from tvm_sparse.frontends.loading import load
from tvm_sparse.frontends.torch import open_program
from tvm_sparse.model import Model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def ops_of(model: Model) -> list[str]:
    values = [binding.value for binding in bindings_of(main_of(model.mod))]
    return [v.op.name.removeprefix("relax.") for v in values if isinstance(v, relax.Call)]


def agree(net: Any, x: Any, dynamic: Any = None) -> Model:
    """Load the exported program, check its form, and compare with PyTorch; return the model."""
    net = net.eval()
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=dynamic)
        expected = net(x).numpy()
    model = load(program)
    assert check_canonical(model) == []
    executable = tvm.compile(model.mod, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    arrays = [x.numpy(), *model.params.values()]
    actual = machine["main"](*[tvm.runtime.tensor(array) for array in arrays]).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    return model


def randomise_statistics(net: Any) -> None:
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
            module.bias.data.normal_()


def test_a_transformer_stores_each_weight_once_and_needs_no_guards():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 64, activation="gelu", batch_first=True, dropout=0.1
    )
    model = agree(torch.nn.TransformerEncoder(layer, 2), torch.randn(2, 6, 32))
    ops = ops_of(model)
    assert "where" not in ops
    assert "broadcast_to" not in ops
    assert ops.count("nn.layer_norm") == 4
    layers = set(model.layer_names.values())
    assert {"layers.0.self_attn", "layers.1.linear1", "layers.1.self_attn.out_proj"} <= layers
    assert model.params["p_layers_0_self_attn_in_proj_weight"].shape == (32, 96)


def test_a_masked_softmax_keeps_its_guard():
    class Masked(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            mask = torch.ones(6, 6, dtype=torch.bool).tril()
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    agree(Masked(), torch.randn(2, 4, 6, 8))


def test_a_convolutional_network_with_symbolic_batch():
    torch.manual_seed(0)
    nn = torch.nn
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    randomise_statistics(net)
    model = agree(net, torch.randn(2, 3, 12, 12), ({0: torch.export.Dim("batch")},))
    assert "nn.batch_norm" not in ops_of(model)
    assert isinstance(model.inputs[0].shape[0], str)
    assert model.outputs[0].shape == (model.inputs[0].shape[0], 5)
    assert model.layer_names["p_8_weight"] == "8"


def test_batch_norm_of_features_goes_into_the_linear_layer():
    nn = torch.nn
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.SiLU(), nn.Linear(9, 2, bias=False))
    randomise_statistics(net)
    model = agree(net, torch.randn(3, 6))
    assert [op for op in ops_of(model) if op in ("matmul", "add")] == ["matmul", "add", "matmul"]


def test_shapes_fix_a_symbolic_batch():
    net = torch.nn.Linear(6, 9)
    program = torch.export.export(
        net, (torch.randn(2, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    model = load(program, shapes={"input": (5, 6)})
    assert model.outputs[0].shape == (5, 9)


def test_tied_weights_are_one_parameter():
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(8, 8, bias=False)
            self.b = torch.nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Any) -> Any:
            return self.b(torch.relu(self.a(x)))

    assert len(agree(Tied(), torch.randn(3, 8)).params) == 1


def test_a_module_that_was_not_exported_says_how_to():
    with pytest.raises(ModelError, match=r"torch\.export\.export"):
        load(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_linear_layer_in_half_precision_is_refused_in_words(dtype):
    # TVM 0.27 imports its product in float32, and then cannot add the bias; ONNX files work.
    net = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU()).to(getattr(torch, dtype))
    x = torch.randn(5, 16).to(getattr(torch, dtype))
    with pytest.raises(ModelError, match="cannot import this PyTorch program: Binary operators"):
        load(torch.export.export(net.eval(), (x,)))


def saved_program(path: Path) -> Path:
    net = torch.nn.Linear(4, 3).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),)), path)
    return path


def test_a_saved_program_is_opened_and_the_environment_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    program = open_program(saved_program(tmp_path / "m.pt2"))
    assert [spec.shape for spec in load(program).inputs] == [(2, 4)]
    switches = {name: value for name, value in os.environ.items() if "TORCH_FORCE" in name}
    assert switches == {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("place", ["opaque_obj_0", "custom_obj_0", "the example inputs"])
def test_what_is_pickled_in_a_program_runs_no_code(tmp_path, place):
    whole, changed = saved_program(tmp_path / "m.pt2"), tmp_path / "changed.pt2"
    ran = tmp_path / "ran"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if place == "the example inputs" and "sample_inputs" in name:
                buffer = io.BytesIO()
                torch.save(Bomb(ran), buffer)
                data, place = buffer.getvalue(), "replaced"
            new.writestr(name, data)
        if place.endswith("obj_0"):
            root = old.namelist()[0].partition("/")[0]
            new.writestr(f"{root}/data/constants/{place}", pickle.dumps(Bomb(ran)))
            place = "replaced"
    assert place == "replaced"
    with pytest.raises(ModelError, match=r"unpickling|cannot be read"):
        open_program(changed)
    assert not ran.exists()


def test_a_program_that_is_cut_off_is_refused_in_a_sentence(tmp_path):
    path = saved_program(tmp_path / "m.pt2")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelError, match=r"not a file that torch.export.save|cannot be read"):
        open_program(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"is not a file that torch.export.save wrote"):
        open_program(path)
