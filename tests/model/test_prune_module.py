"""Masks on modules of PyTorch: they are exact, fine-tuning keeps them, and exports hold zeros."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest

import tvm_sparse as ts
from tvm_sparse.errors import ModelError, SparseError
from tvm_sparse.pruning import CubicSchedule, OneShot, prune_module

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def net(seed: int = 0, dtype=None):
    torch.manual_seed(seed)
    nn = torch.nn
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 36, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )
    return layers.to(dtype) if dtype is not None else layers


def images(count: int = 4, dtype=None):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights_of(module) -> dict[str, np.ndarray]:
    return {
        path: part.weight.detach().float().numpy()
        for path, part in module.named_modules()
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))
    }


def zeros_of(module) -> int:
    return sum(int((weight == 0).sum()) for weight in weights_of(module).values())


PATTERNS = ("unstructured", "2:4", "4:2:8", "block:2x2", "kernel", "channel", "vector:4")


@pytest.mark.parametrize("pattern", [*PATTERNS, "tile-wise:4"])
def test_a_module_is_pruned_as_its_onnx_file_is(pattern, tmp_path):
    pytest.importorskip("onnxscript")
    module = net().eval()
    path = tmp_path / "net.onnx"
    export_onnx(module, path)
    model = ts.load(ts.prune(path, pattern, None if ":" in pattern[:4] else 0.6))
    sparsity = None if ":" in pattern[:4] else 0.6
    masks = prune_module(module, pattern, sparsity)
    found = ts.load(torch.export.export(masks.make_permanent(), (images(),)))
    by_layer = [
        sorted(
            (value.size, np.count_nonzero(value)) for value in m.params.values() if value.ndim > 1
        )
        for m in (model, found)
    ]
    assert by_layer[0] == by_layer[1]


def export_onnx(module, path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (images(),), path, dynamo=True, verbose=False)


def test_modules_are_named_by_their_paths_and_skipped_by_them():
    masks = prune_module(net(), sparsity=0.75, skip=["0", "nosuch"])
    assert [cut.layer.name for cut in masks.report.layers] == ["3", "5", "7"]
    assert masks.report.kept == {"0": "skip names it ('0')"}
    assert masks.report.notes == ("skip 'nosuch' matches no layer",)
    assert masks.report.sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "row"])
def test_every_scope_cuts_the_share_and_reports_what_the_module_holds(scope):
    module = net()
    masks = prune_module(module, sparsity=0.5, scope=scope)
    cuts = {cut.layer.name: cut.zeros_after for cut in masks.report.layers}
    assert cuts == {name: int((w == 0).sum()) for name, w in weights_of(module).items()}
    assert sum(cuts.values()) == pytest.approx(
        0.5 * sum(w.size for w in weights_of(module).values()), abs=20
    )


def train(module, steps: int, **options) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(images()).square().mean() + module(images()).sum()
        loss.backward()
        optimizer.step()


def test_fine_tuning_keeps_the_masks_and_moves_the_rest():
    module = net()
    prune_module(module, sparsity=0.8)
    before = weights_of(module)
    train(module, 5)
    for name, after in weights_of(module).items():
        assert np.array_equal(after == 0, before[name] == 0)
        assert not np.array_equal(after, before[name])


def test_gradients_of_pruned_elements_are_zero():
    module = net()
    prune_module(module, sparsity=0.8)
    module(images()).square().sum().backward()
    for part in (module[0], module[5]):
        gradient = part.parametrizations.weight.original.grad
        assert (gradient[part.weight == 0] == 0).all()
        assert (gradient[part.weight != 0] != 0).any()


def test_zeros_are_plain_ones_whatever_the_weights_hold():
    module = net()
    with torch.no_grad():
        module[5].weight[:] = -torch.rand_like(module[5].weight) - 0.1
        module[5].weight[0, 0] = float("nan")
        module[5].weight[1] = -0.0
    masks = prune_module(module, sparsity=0.5)
    values = module[5].weight.detach().numpy()
    assert np.isnan(values[0, 0])
    assert not values[1].any()
    assert not np.signbit(values[values == 0]).any()
    masks.make_permanent()
    assert np.isnan(module[5].weight.detach().numpy()[0, 0])


def test_a_schedule_grows_and_what_was_cut_stays_cut():
    module = net()
    schedule = CubicSchedule(0.9, steps=4)
    masks = prune_module(module, schedule=schedule)
    assert zeros_of(module) == 0
    cut = {name: weight == 0 for name, weight in weights_of(module).items()}
    for step in range(1, 6):
        train(module, 1)
        report = masks.update(step)
        assert report.sparsity == pytest.approx(schedule.at(step), abs=1e-3)
        now = {name: weight == 0 for name, weight in weights_of(module).items()}
        assert all((now[name] >= cut[name]).all() for name in now)
        cut = now


def test_steps_and_schedules_go_together():
    masks = prune_module(net(), sparsity=0.5)
    with pytest.raises(SparseError, match="go together"):
        masks.update(3)
    masks.update()
    with pytest.raises(SparseError, match="go together"):
        prune_module(net(), schedule=OneShot(0.5)).update()
    with pytest.raises(SparseError, match="leave sparsity out"):
        prune_module(net(), sparsity=0.5, schedule=OneShot(0.5))
    masks.make_permanent()
    with pytest.raises(SparseError, match="permanent already"):
        masks.update()


def test_permanent_zeros_leave_a_plain_module_that_computes_the_same():
    module = net().eval()
    plain = set(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    masks = prune_module(module, sparsity=0.7)
    with torch.no_grad():
        wanted = module(images())
        assert masks.make_permanent() is module
        assert torch.equal(module(images()), wanted)
    assert set(module.state_dict()) == plain
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} == known


def test_masks_are_saved_and_read_back_with_the_module():
    module = net()
    prune_module(module, sparsity=0.7)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    other = net(seed=5)
    prune_module(other, sparsity=0.1)
    other.load_state_dict(torch.load(stream))
    for name, weight in weights_of(module).items():
        assert np.array_equal(weights_of(other)[name], weight)


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_exported_programs_hold_the_zeros(permanent, pattern):
    module = net().eval()
    masks = prune_module(module, pattern)
    if permanent:
        masks.make_permanent()
    model = ts.load(torch.export.export(module, (images(),)))
    found = {layer.name: (layer.nnz, layer.density) for layer in ts.inspect(model).layers}
    wanted = {cut.layer.name: cut.size - cut.zeros_after for cut in masks.report.layers}
    assert {name: nnz for name, (nnz, _) in found.items()} == wanted


@pytest.mark.parametrize("permanent", [False, True])
def test_exported_onnx_files_hold_the_zeros(permanent, tmp_path):
    pytest.importorskip("onnxscript")
    module = net().eval()
    masks = prune_module(module, sparsity=0.7)
    if permanent:
        masks.make_permanent()
    export_onnx(module, tmp_path / "net.onnx")
    found = sorted(layer.nnz for layer in ts.inspect(tmp_path / "net.onnx").layers)
    assert found == sorted(cut.size - cut.zeros_after for cut in masks.report.layers)


def test_masks_of_large_layers_are_folded_into_their_weights_by_the_loader(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module, x = torch.nn.Sequential(torch.nn.Linear(600, 700)).eval(), torch.randn(2, 600)
    prune_module(module, sparsity=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    for source in (torch.export.export(module, (x,)), tmp_path / "net.onnx"):
        [layer] = ts.inspect(source).layers
        assert layer.nnz == 42000


def test_taylor_scores_take_the_gradients_that_are_there():
    module = net()
    with pytest.raises(SparseError, match="layer '0' has no gradient"):
        prune_module(module, sparsity=0.5, scores="taylor")
    assert not hasattr(module[0], "parametrizations")
    module(images()).square().sum().backward()
    score = (module[5].weight * module[5].weight.grad).abs().detach().numpy()
    masks = prune_module(module, sparsity=0.5, scope="layer", scores="taylor")
    kept = module[5].weight.detach().numpy() != 0
    assert score[kept].min() >= score[~kept].max()
    module(images()).square().sum().backward()
    masks.update()
    assert masks.report.sparsity == pytest.approx(0.5, abs=1e-2)


def test_wanda_scores_run_the_module_on_calibration_inputs():
    module = net().train()
    running = module[1].running_mean.clone()
    inputs = {}
    probe = copy.deepcopy(module).eval()
    probe[5].register_forward_pre_hook(lambda part, args: inputs.update(x=args[0].detach()))
    probe(images())
    prune_module(module, sparsity=0.5, scores="wanda", calibration=[images()[:2], images()[2:]])
    score = probe[5].weight.detach().abs().numpy() * inputs["x"].norm(dim=0).numpy()
    kept = module[5].weight.detach().numpy() != 0
    assert (kept.sum(axis=1) == score.shape[1] // 2).all()
    for row in range(score.shape[0]):
        assert score[row][kept[row]].min() >= score[row][~kept[row]].max() * (1 - 1e-5)
    assert module.training
    assert torch.equal(module[1].running_mean, running)


def test_wanda_says_what_it_lacks():
    with pytest.raises(SparseError, match="go together"):
        prune_module(net(), sparsity=0.5, scores="wanda")
    with pytest.raises(SparseError, match="do not fit the module"):
        prune_module(net(), sparsity=0.5, scores="wanda", calibration=torch.ones(2, 5))
    with pytest.raises(SparseError, match="no calibration inputs"):
        prune_module(net(), sparsity=0.5, scores="wanda", calibration=[])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_are_pruned_and_keep_their_type(dtype):
    module = net(dtype=getattr(torch, dtype))
    masks = prune_module(module, sparsity=0.6)
    assert masks.report.sparsity == pytest.approx(0.6, abs=1e-3)
    masks.make_permanent()
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    assert zeros_of(module) == sum(cut.zeros_after for cut in masks.report.layers)


def test_seeds_reproduce():
    def masked(seed: int) -> np.ndarray:
        module = net()
        torch.nn.init.ones_(module[5].weight)
        prune_module(module, sparsity=0.5, scope="layer", seed=seed)
        return weights_of(module)["5"]

    assert np.array_equal(masked(1), masked(1))
    assert not np.array_equal(masked(1), masked(2))


def test_attention_layers_are_pruned_and_take_their_fast_path_with_zeros():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    masks = prune_module(layer, sparsity=0.5, scope="layer")
    names = [cut.layer.name for cut in masks.report.layers]
    assert names == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        masked = layer(x)
        masks.make_permanent()
        assert torch.allclose(layer(x), masked, atol=1e-6)
    assert (layer.self_attn.in_proj_weight == 0).float().mean() == 0.5


class Tied(torch.nn.Module):
    def __init__(self, embed: bool) -> None:
        super().__init__()
        self.a = torch.nn.Linear(8, 8, bias=False)
        self.b = torch.nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.c = torch.nn.Linear(8, 8)
        if embed:
            self.table = torch.nn.Embedding(8, 8)
            self.table.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x))))


def test_tied_weights_share_a_mask_and_stay_tied():
    module = Tied(embed=False)
    masks = prune_module(module, sparsity=0.5, scope="layer")
    assert [cut.layer.name for cut in masks.report.layers] == ["a, b", "c"]
    assert torch.equal(module.a.weight, module.b.weight)
    masks.update()
    masks.make_permanent()
    assert module.a.weight is module.b.weight
    assert int((module.a.weight == 0).sum()) == 32


def test_a_weight_that_is_an_embedding_too_stays():
    report = prune_module(Tied(embed=True), sparsity=0.5).report
    assert report.kept == {"a, b": "its weight also serves 'table'"}


def test_masks_go_on_top_of_other_parametrizations():
    module = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    torch.nn.utils.parametrizations.weight_norm(module[0])
    masks = prune_module(module, sparsity=0.5, scope="layer")
    assert int((module[0].weight == 0).sum()) == 24
    masks.update()
    assert int((module[0].weight == 0).sum()) == 24
    masks.make_permanent()
    assert int((module[0].weight == 0).sum()) == 24


def test_masks_of_pytorch_itself_are_seen_before_and_after_they_are_removed():
    from torch.nn.utils import prune as torch_prune

    module, other = net().eval(), net()
    for part in (module[5], other[5]):
        torch_prune.l1_unstructured(part, "weight", amount=0.8)
    report = prune_module(other, sparsity=0.5).report
    assert report.kept["5"].startswith("torch.nn.utils.prune has a mask on it")
    for _ in range(2):
        layers = ts.inspect(ts.load(torch.export.export(module, (images(),)))).layers
        [layer] = [layer for layer in layers if layer.name == "5"]
        assert layer.density == pytest.approx(0.2, abs=1e-3)
        if torch_prune.is_pruned(module[5]):
            torch_prune.remove(module[5], "weight")
    report = prune_module(module, sparsity=0.0).report
    [cut] = [cut for cut in report.layers if cut.layer.name == "5"]
    assert cut.zeros_before == round(0.8 * cut.size)


def test_what_is_no_prunable_module_is_refused_in_words():
    with pytest.raises(ModelError, match=r"takes a torch\.nn\.Module; this is a int"):
        prune_module(7)
    with pytest.raises(ModelError, match="is pruned in place by prune_module"):
        ts.prune(net())
    with pytest.raises(ModelError, match="no weight"):
        prune_module(torch.nn.ReLU())
    report = prune_module(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ConvTranspose2d(2, 2, 3)), sparsity=0.5
    ).report
    assert report.kept == {"1": "it is a transposed convolution"}
