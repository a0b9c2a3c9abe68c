"""Masks in ONNX graphs, and checkpoints laid over them, in the forms that tools write."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from load_support import assert_close, onnx_model, ops_of, random, run_model, run_onnx
from onnx import TensorProto, helper, numpy_helper
from tvm_sparse.passes.canonicalize import check_canonical

import tvm_sparse as ts
from tvm_sparse.errors import ModelError
from tvm_sparse.frontends.loading import load
from tvm_sparse.frontends.onnx_overlay import with_weights
from tvm_sparse.model import Model
from tvm_sparse.pruning import prune_with_report

MASK = random(8, 6, seed=9) > 0.5
WEIGHT = random(8, 6)
ZEROS = int(np.count_nonzero(~MASK))


def node(op: str, inputs: str, output: str, name: str = "", **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=name, **attributes)


def gemm(weight: str) -> onnx.NodeProto:
    return node("Gemm", f"x {weight}", "y", "/fc/Gemm", transB=1)


def masked(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    weights = {"fc.weight_orig": WEIGHT, "fc.weight_mask": MASK.astype(np.float32), **constants}
    read = {name for item in nodes for name in item.input}
    return onnx_model(nodes, {k: v for k, v in weights.items() if k in read}, {"x": (3, 6)})


MASKED = {
    "torch.nn.utils.prune without remove": masked(
        [node("Mul", "fc.weight_mask fc.weight_orig", "w"), gemm("w")]
    ),
    "NNCF: the mask as truth values, cast": masked(
        [
            node("Cast", "bits", "m", to=TensorProto.FLOAT),
            node("Mul", "fc.weight_orig m", "w"),
            gemm("w"),
        ],
        bits=MASK,
    ),
    "a choice between the weight and zero": masked(
        [node("Where", "bits fc.weight_orig zero", "w"), gemm("w")],
        bits=MASK,
        zero=np.zeros((), np.float32),
    ),
    "a comparison of scores with a threshold": masked(
        [
            node("Greater", "scores threshold", "b"),
            node("Cast", "b", "m", to=TensorProto.FLOAT),
            node("Mul", "fc.weight_orig m", "w"),
            gemm("w"),
        ],
        scores=MASK.astype(np.float32),
        threshold=np.array(0.5, np.float32),
    ),
    "a product that is transposed": masked(
        [
            node("Mul", "fc.weight_orig fc.weight_mask", "w"),
            node("Transpose", "w", "wt", perm=[1, 0]),
            node("MatMul", "x wt", "y", "/fc/MatMul"),
        ]
    ),
    "operands that are transposed and reshaped": masked(
        [
            node("Transpose", "fc.weight_orig", "a", perm=[1, 0]),
            node("Reshape", "flat shape", "b"),
            node("Mul", "a b", "w"),
            node("MatMul", "x w", "y", "/fc/MatMul"),
        ],
        flat=np.ascontiguousarray(MASK.T, np.float32).reshape(-1),
        shape=np.array([6, 8]),
    ),
    "two masks, one after the other": masked(
        [
            node("Mul", "fc.weight_orig fc.weight_mask", "a"),
            node("Mul", "a fc.weight_mask", "w"),
            gemm("w"),
        ]
    ),
}


@pytest.mark.parametrize("form", MASKED)
def test_a_mask_in_the_graph_is_found_and_multiplied_in(form):
    proto = MASKED[form]
    model = load(proto)
    assert check_canonical(model) == []
    assert ops_of(model) == ["matmul"]
    [layer] = ts.inspect(model).layers
    assert layer.name.startswith("/fc/")
    assert layer.nnz == WEIGHT.size - ZEROS
    x = random(3, 6, seed=4)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])
    assert any(note.startswith("masks stood in the graph") for note in model.notes)


@pytest.mark.parametrize("form", MASKED)
def test_pruning_goes_on_from_the_zeros_of_a_mask(form):
    report = prune_with_report(MASKED[form], "unstructured", 0.0)
    [cut] = report.layers
    assert cut.zeros_before == cut.zeros_after == ZEROS
    x = random(3, 6, seed=4)
    assert not {"Mul", "Where", "Cast"} & {item.op_type for item in report.model.graph.node}
    assert_close(run_onnx(report.model, x=x)[0], run_onnx(MASKED[form], x=x)[0])


def test_a_product_with_no_mask_stays_what_it_is():
    proto = masked([node("Mul", "fc.weight_orig scale", "w"), gemm("w")], scale=random(8, 1))
    assert load(proto).notes == ()
    with pytest.raises(ModelError, match="its weight is computed by a Mul"):
        prune_with_report(proto)


def test_a_mask_before_a_quantiser_is_multiplied_in_and_the_weight_refused():
    # SparseML's and NNCF's form of training with fake quantisation.
    nodes = [
        node("Mul", "fc.weight_orig fc.weight_mask", "w"),
        node("QuantizeLinear", "w scale zero", "q"),
        node("DequantizeLinear", "q scale zero", "d"),
        gemm("d"),
    ]
    model = load(masked(nodes, scale=np.array(0.1, np.float32), zero=np.array(0, np.int8)))
    assert any("keeps its quantised weight" in note for note in model.notes)


def test_a_large_mask_that_is_compared_is_folded():
    # Over the limit up to which results may grow: a comparison of a stored mask does not grow.
    weight, scores = random(300, 300), random(300, 300, seed=2)
    proto = onnx_model(
        [
            node("Greater", "scores threshold", "b"),
            node("Where", "b fc.weight_orig zero", "w"),
            node("MatMul", "x w", "y"),
        ],
        {
            "fc.weight_orig": weight,
            "scores": scores,
            "threshold": np.array(0.5, np.float32),
            "zero": np.zeros((), np.float32),
        },
        {"x": (3, 300)},
    )
    [layer] = ts.inspect(proto).layers
    assert layer.nnz == np.count_nonzero(scores > 0.5)


# Checkpoints -------------------------------------------------------------------------------------

OUT, IN = random(8, 6, seed=21), random(5, 8, seed=22)


def exported() -> onnx.ModelProto:
    """Two linear layers as PyTorch's exporter by tracing writes them: one keeps its name."""
    return onnx_model(
        [
            node("MatMul", "x onnx::MatMul_12", "a", "/encoder/layer.0/fc1/MatMul"),
            node("Add", "encoder.layer.0.fc1.bias a", "b", "/encoder/layer.0/fc1/Add"),
            node("Gemm", "b fc2.weight fc2.bias", "y", "/fc2/Gemm", transB=1),
        ],
        {
            "onnx::MatMul_12": random(6, 8, seed=1),
            "encoder.layer.0.fc1.bias": random(8, seed=2),
            "fc2.weight": random(5, 8, seed=3),
            "fc2.bias": random(5, seed=4),
        },
        {"x": (3, 6)},
    )


STATE = {
    "encoder.layer.0.fc1.weight": OUT,
    "encoder.layer.0.fc1.bias": random(8, seed=23),
    "fc2.weight": IN,
    "fc2.bias": random(5, seed=24),
}


def expected(x: np.ndarray) -> np.ndarray:
    hidden = x @ OUT.T + STATE["encoder.layer.0.fc1.bias"]
    return hidden @ IN.T + STATE["fc2.bias"]


def check(model: Model) -> None:
    x = random(3, 6, seed=5)
    assert check_canonical(model) == []
    assert_close(run_model(model, x)[0], expected(x))


def test_the_module_of_a_renamed_weight_is_read_from_its_node():
    model = load(exported(), weights=STATE)
    check(model)
    assert "laid over transposed, as the exporter wrote them: 'onnx::MatMul_12'" in model.notes


def test_the_newer_exporter_tells_the_module_in_the_metadata():
    proto = exported()
    first = proto.graph.node[0]
    first.name = "node_MatMul_9"
    for item in proto.graph.node:
        for index, name in enumerate(item.input):
            item.input[index] = name.replace("onnx::MatMul_12", "val_8")
    proto.graph.initializer[0].name = "val_8"
    entry = first.metadata_props.add()
    entry.key = "pkg.torch.onnx.name_scopes"
    entry.value = "['', 'encoder', 'encoder.layer.0', 'encoder.layer.0.fc1', 'linear']"
    check(load(proto, weights=STATE))


def test_the_same_weights_go_into_an_onnx_model():
    proto, notes = with_weights(exported(), STATE)
    x = random(3, 6, seed=5)
    assert_close(run_onnx(proto, x=x)[0], expected(x))
    assert notes[0] == "the given weights gave 4 of the model's 4 weights and biases"


def test_masks_alone_hide_weights_of_the_model():
    mask = random(8, 6, seed=8) > 0
    model = load(exported(), weights={"encoder.layer.0.fc1.weight_mask": mask})
    first, second = ts.inspect(model).layers
    assert first.nnz == np.count_nonzero(mask)
    assert second.nnz == IN.size


def test_a_masked_graph_takes_the_weights_of_a_masked_checkpoint():
    proto = MASKED["torch.nn.utils.prune without remove"]
    weight, mask = random(8, 6, seed=31), random(8, 6, seed=32) > 0
    state = {"fc.weight_orig": weight, "fc.weight_mask": mask.astype(np.float32)}
    x = random(3, 6, seed=5)
    assert_close(run_model(load(proto, weights=state), x)[0], x @ (weight * mask).T)


def test_a_relax_module_takes_weights_by_the_names_of_its_parameters():
    model = load(exported())
    name = next(name for name, value in model.params.items() if value.shape == (6, 8))
    new = random(6, 8, seed=40)
    again = load(model.mod, params=model.params, weights={name: new})
    assert np.array_equal(again.params[name], new)
    assert again.notes[0].startswith("the given weights gave 1 of the model's 4")


def convolution(name: str) -> onnx.ModelProto:
    """A convolution into which an exporter folded the BatchNorm behind it."""
    return onnx_model(
        [node("Conv", f"x {name}", "y", "/conv/Conv")],
        {name: random(4, 3, 3, 3)},
        {"x": (1, 3, 8, 8)},
    )


NORMED = {
    "conv.weight": random(4, 3, 3, 3, seed=7),
    "bn.weight": random(4),
    "bn.running_mean": random(4),
}


def test_a_folded_batchnorm_is_not_undone_by_the_weights_before_it():
    # PyTorch's newer exporter keeps the name of the weight that it scales.
    with pytest.raises(ModelError, match=r"folded the BatchNorm of 'bn.running_mean' into it"):
        load(convolution("conv.weight"), weights=NORMED)
    # The older one gives it a number for a name.
    with pytest.raises(ModelError, match=r"'conv.weight' .* 'onnx::Conv_30'.* folded something"):
        load(convolution("onnx::Conv_30"), weights={"conv.weight": NORMED["conv.weight"]})


def test_a_convolution_whose_weight_has_a_name_of_its_own_takes_it():
    weight = NORMED["conv.weight"]
    model = load(convolution("w"), weights={"w": weight})
    assert np.array_equal(next(iter(model.params.values())), weight)


@pytest.mark.parametrize("name", ["conv.weight", "onnx::Conv_30"])
def test_masks_fit_weights_that_a_batchnorm_was_folded_into(name):
    mask = random(4, 3, 3, 3, seed=8) > 0
    [layer] = ts.inspect(load(convolution(name), weights={"conv.weight_mask": mask})).layers
    assert layer.nnz == np.count_nonzero(mask)


def test_a_loaded_model_takes_no_weights():
    with pytest.raises(ModelError, match="takes neither shapes nor params nor weights"):
        load(load(exported()), weights=STATE)


def test_what_is_laid_over_stands_in_the_report():
    report = ts.inspect(load(exported(), weights=STATE))
    assert "note: the given weights gave 4 of the model's 4 weights and biases" in str(report)


def test_the_command_line_lays_weights_over_and_writes_masks(tmp_path, capsys):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    from tvm_sparse.cli import main

    onnx.save_model(exported(), tmp_path / "m.onnx")
    numpy_files.save_file(STATE, tmp_path / "w.safetensors")
    paths = {
        name: str(tmp_path / name)
        for name in ("m.onnx", "w.safetensors", "p.onnx", "k.safetensors")
    }
    both = [paths["m.onnx"], "--weights", paths["w.safetensors"]]
    assert (
        main(
            [
                "prune",
                *both,
                "-o",
                paths["p.onnx"],
                "--sparsity",
                "0.5",
                "--masks",
                paths["k.safetensors"],
            ]
        )
        == 0
    )
    assert "w.safetensors' gave 4 of the model's 4" in capsys.readouterr().out
    pruned = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(paths["p.onnx"]).graph.initializer
    }
    masks = numpy_files.load_file(paths["k.safetensors"])
    assert set(masks) == {"onnx::MatMul_12_mask", "fc2.weight_mask"}
    for name, mask in masks.items():
        assert np.array_equal(mask, pruned[name.removesuffix("_mask")] != 0)
    assert main(["inspect", paths["m.onnx"], "--weights", paths["k.safetensors"]]) == 0
    assert "gave masks for 2 of the model's 4" in capsys.readouterr().out


def test_a_checkpoint_alone_takes_no_weights_over_it(tmp_path, capsys):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    from tvm_sparse.cli import main

    numpy_files.save_file(STATE, tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", path, "--weights", path])
    assert stop.value.code == 2
    assert main(["inspect", path]) == 0
    assert "fc2" in capsys.readouterr().out
    assert main(["compile", path, "-o", str(tmp_path / "m.so")]) == 1
    assert "holds weights without a graph" in capsys.readouterr().err


def test_bench_times_the_model_with_the_weights_that_were_laid_over(tmp_path, monkeypatch):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    from tvm_sparse import bench, cli

    onnx.save_model(exported(), tmp_path / "m.onnx")
    numpy_files.save_file(STATE, tmp_path / "w.safetensors")
    timed = []

    def measure(model, *args, **options):
        timed.append((model, options["name"]))
        return bench.BenchResult("cpu", "Linux", {}, "now", ())

    monkeypatch.setattr(bench, "bench", measure)
    cli.main(["bench", str(tmp_path / "m.onnx"), "--weights", str(tmp_path / "w.safetensors")])
    [(model, name)] = timed
    assert name == "m"
    x = random(3, 6, seed=5)
    assert_close(run_onnx(model, x=x)[0], expected(x))
