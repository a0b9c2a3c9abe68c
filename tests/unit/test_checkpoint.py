"""Checkpoints of pruning tools: each form that they write becomes the weight that it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_sparse as ts
from tvm_sparse.errors import MissingExtraError, ModelError
from tvm_sparse.frontends.checkpoint import open_checkpoint
from tvm_sparse.frontends.mask_names import masked_weight, plain_name
from tvm_sparse.frontends.overlay import Target, lay_over

numpy_files = pytest.importorskip("safetensors.numpy", reason="needs safetensors")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pruned(*shape: int, seed: int = 0, density: float = 0.3) -> np.ndarray:
    kept = np.random.default_rng(seed + 1).random(shape) < density
    return np.where(kept, random(*shape, seed=seed), np.float32(0))


def bitmask(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The form "sparse-bitmask" of compressed-tensors, as LLM-Compressor writes it."""
    kept = weight != 0
    counts = kept.sum(axis=-1)
    return {
        f"{name}.shape": np.array(weight.shape, np.int64),
        f"{name}.compressed": weight[kept],
        f"{name}.bitmask": np.packbits(kept, axis=-1, bitorder="little"),
        f"{name}.row_offsets": (np.cumsum(counts) - counts).astype(np.int64),
    }


def two_four_bitmask(module: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The form "sparse-24-bitmask" of compressed-tensors: no ".weight", and two values of four."""
    order = np.argsort(-np.abs(weight).reshape(-1, 4), axis=1, kind="stable")
    kept = np.zeros((weight.size // 4, 4), bool)
    np.put_along_axis(kept, order[:, :2], True, axis=1)
    kept = kept.reshape(weight.shape)
    return {
        f"{module}.shape": np.array(weight.shape, np.int64).reshape(-1, 1),
        f"{module}.compressed": weight[kept].reshape(len(weight), -1),
        f"{module}.bitmask": np.packbits(kept, axis=-1, bitorder="little"),
    }


def read(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return open_checkpoint(tensors).entries[name].read()


# What the tools write ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 41), st.floats(0, 1), st.integers(0, 99))
def test_bits_and_nonzeros_become_the_weight_that_was_packed(rows, columns, density, seed):
    weight = pruned(rows, columns, seed=seed, density=density)
    assert np.array_equal(read(bitmask("fc.weight", weight), "fc.weight"), weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_two_four_form_is_the_same_without_the_word_weight(dtype):
    weight = random(6, 16).reshape(-1, 4)
    weight[:, 1:3] = 0
    weight = weight.reshape(6, 16).astype(dtype)
    found = read(two_four_bitmask("layers.0.fc", weight), "layers.0.fc.weight")
    assert found.dtype == weight.dtype
    assert np.array_equal(found, weight)


def test_pytorchs_prune_leaves_the_weight_and_its_mask():
    weight, mask = random(4, 6), (random(4, 6, seed=3) > 0).astype(np.float32)
    checkpoint = open_checkpoint({"fc.weight_orig": weight, "fc.weight_mask": mask})
    assert list(checkpoint.entries) == ["fc.weight"]
    assert np.array_equal(checkpoint.entries["fc.weight"].read(), weight * mask)


def test_what_a_mask_hides_is_zero_even_where_the_weight_is_no_number():
    weight = np.array([[np.nan, 1.0], [np.inf, 2.0]], np.float32)
    mask = np.array([[0.0, 1.0], [0.0, 1.0]], np.float32)
    found = read({"fc.weight_orig": weight, "fc.weight_mask": mask}, "fc.weight")
    assert np.array_equal(found, [[0, 1], [0, 2]])


@pytest.mark.parametrize(
    ("mask", "weight"),
    [
        ("fc.weight_mask", "fc.weight"),
        ("weight_mask", "weight"),
        ("a.fc.parametrizations.weight.0.mask", "a.fc.weight"),
        ("parametrizations.weight.1.mask", "weight"),
        ("__nncf_hooks.post_hooks.layer1:0:conv1:weight__0.0.binary_mask", "layer1.0.conv1.weight"),
        ("fc.weight", None),
        ("attention.mask", None),
    ],
)
def test_masks_are_told_by_their_names(mask, weight):
    assert masked_weight(mask) == weight


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("fc.weight_orig", "fc.weight"),
        ("a.fc.parametrizations.weight.original", "a.fc.weight"),
        ("parametrizations.weight.original", "weight"),
        ("the.original", "the.original"),
        ("fc.weight", "fc.weight"),
    ],
)
def test_parameters_get_back_the_names_that_they_had(name, plain):
    assert plain_name(name) == plain


def test_nncf_keeps_truth_values_or_trains_numbers_whose_sign_decides():
    weight, logits = random(4, 6), random(4, 6, seed=5)
    hooks = "__nncf_hooks.post_hooks.fc:weight__0.0"
    for name, mask in ((f"{hooks}.binary_mask", logits > 0), (f"{hooks}.mask", logits)):
        found = read({"fc.weight": weight, name: mask}, "fc.weight")
        assert np.array_equal(found, np.where(logits > 0, weight, 0))


def test_a_mask_with_other_values_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'fc.weight_mask' holds other values than 0 and 1"):
        read({"fc.weight": random(2, 2), "fc.weight_mask": random(2, 2)}, "fc.weight")


def test_a_mask_of_another_shape_is_refused_by_name():
    with pytest.raises(ModelError, match=r"'fc.weight_mask' is 2x3, but 'fc.weight_orig' is 3x2"):
        open_checkpoint({"fc.weight_orig": random(3, 2), "fc.weight_mask": np.ones((2, 3))})


def test_a_weight_that_stands_there_twice_is_refused():
    with pytest.raises(ModelError, match=r"holds 'fc.weight' twice"):
        open_checkpoint({"fc.weight": random(3, 2), "fc.weight_orig": random(3, 2)})


@pytest.mark.parametrize("part", ["shape", "compressed"])
def test_a_packed_weight_that_lacks_a_part_is_refused(part):
    tensors = bitmask("fc.weight", pruned(4, 9))
    del tensors[f"fc.weight.{part}"]
    with pytest.raises(ModelError, match=f"lacks its part 'fc.weight.{part}'"):
        open_checkpoint(tensors)


def test_a_packed_weight_whose_parts_disagree_is_refused():
    tensors = bitmask("fc.weight", pruned(4, 9))
    tensors["fc.weight.compressed"] = tensors["fc.weight.compressed"][1:]
    with pytest.raises(ModelError, match=r"'fc.weight' has \d+ nonzeros, and bits for \d+"):
        read(tensors, "fc.weight")


QUANTISED = {
    "pack-quantized of compressed-tensors": {
        "fc.weight_packed": np.zeros((4, 1), np.int32),
        "fc.weight_scale": np.ones((4, 1), np.float16),
        "fc.weight_shape": np.array([4, 8]),
    },
    "int-quantized of compressed-tensors": {
        "fc.weight": np.zeros((4, 8), np.int8),
        "fc.weight_scale": np.ones((4, 1), np.float16),
    },
    "GPTQ": {
        "fc.qweight": np.zeros((1, 4), np.int32),
        "fc.qzeros": np.zeros((1, 1), np.int32),
        "fc.scales": np.ones((1, 4), np.float16),
        "fc.g_idx": np.zeros(8, np.int32),
    },
    "sparse-bitmask over eight bits": {
        **bitmask("fc.weight", pruned(4, 8).astype(np.int8)),
        "fc.weight_scale": np.ones((4, 1), np.float16),
    },
}


@pytest.mark.parametrize("form", QUANTISED)
def test_quantised_weights_are_refused_with_the_reason(form):
    checkpoint = open_checkpoint({**QUANTISED[form], "fc.bias": random(4)})
    assert list(checkpoint.entries) == ["fc.bias"]
    assert "quantised" in checkpoint.refused["fc.weight"]
    with pytest.raises(ModelError, match=r"'fc.weight' .* cannot be taken: it is quantised"):
        lay_over([Target("fc.weight", random(4, 8))], checkpoint)


# Files -------------------------------------------------------------------------------------------


def test_types_of_half_precision_are_read_and_widened_exactly(tmp_path):
    narrow = {"a.weight": random(3, 4).astype(ml_dtypes.bfloat16)}
    numpy_files.save_file(narrow, tmp_path / "x.safetensors")
    overlay = lay_over(
        [Target("a.weight", random(3, 4, seed=2))], open_checkpoint(tmp_path / "x.safetensors")
    )
    assert overlay.values["a.weight"].dtype == np.float32
    assert np.array_equal(overlay.values["a.weight"], narrow["a.weight"].astype(np.float32))
    assert not any("rounded" in note for note in overlay.notes)


def test_values_that_are_rounded_are_said():
    target = Target("a.weight", random(3, 4).astype(np.float16))
    overlay = lay_over([target], open_checkpoint({"a.weight": random(3, 4)}))
    assert "were rounded to the model's type in 'a.weight'" in overlay.notes[-1]


def write_shards(folder: Path) -> dict[str, np.ndarray]:
    """Two files and their index, as transformers writes large models."""
    weights = {"a.weight": random(3, 4), "b.weight": random(4, 3, seed=1)}
    places = {}
    for number, (name, value) in enumerate(weights.items(), 1):
        places[name] = f"model-0000{number}-of-00002.safetensors"
        numpy_files.save_file({name: value}, folder / places[name])
    index = {"metadata": {"total_size": 96}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize("name", [".", "model.safetensors.index.json"])
def test_a_folder_of_several_files_is_one_checkpoint(tmp_path, name):
    weights = write_shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path / name)
    assert {name: entry.shape for name, entry in checkpoint.entries.items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert np.array_equal(checkpoint.entries["b.weight"].read(), weights["b.weight"])


def test_a_missing_part_of_a_checkpoint_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'model-00002-of-00002.safetensors', which the index"):
        open_checkpoint(tmp_path)


def test_an_index_may_not_name_files_elsewhere(tmp_path):
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ModelError, match="outside its folder"):
        open_checkpoint(tmp_path / "x.safetensors.index.json")


@pytest.mark.parametrize("kept", [0, 7, 40, -3])
def test_a_file_that_is_cut_off_is_refused(tmp_path, kept):
    whole, cut = tmp_path / "w.safetensors", tmp_path / "c.safetensors"
    numpy_files.save_file({"a.weight": random(3, 4)}, whole)
    cut.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"c.safetensors' is no whole safetensors file"):
        open_checkpoint(cut)


def test_a_missing_file_and_a_folder_without_weights_are_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        open_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="holds no safetensors file"):
        open_checkpoint(tmp_path)


def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch):
    numpy_files.save_file({"a.weight": random(3, 4)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install tvm-sparse\[safetensors\]"):
        open_checkpoint(tmp_path / "x.safetensors")


# Matching ----------------------------------------------------------------------------------------


def overlay_of(targets: dict[str, np.ndarray], weights: dict[str, np.ndarray], **options):
    found = [Target(name, value, **options) for name, value in targets.items()]
    return lay_over(found, open_checkpoint(weights))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("module.", ""), ("", "model."), ("model.model.", ""), ("_orig_mod.", "net."), ("", "")],
)
def test_a_prefix_of_either_side_is_seen_through(theirs, ours):
    values = {"a.weight": random(2, 3), "b.weight": random(3, 2)}
    overlay = overlay_of(
        {f"{ours}{name}": np.zeros_like(value) for name, value in values.items()},
        {f"{theirs}{name}": value for name, value in values.items()},
    )
    for name, value in values.items():
        assert np.array_equal(overlay.values[f"{ours}{name}"], value)
    assert sum("without the prefix" in note for note in overlay.notes) == bool(theirs) + bool(ours)


def test_parameters_of_another_module_are_not_taken_for_a_prefix():
    with pytest.raises(ModelError, match="no tensor of the given weights has the name"):
        overlay_of({"b.weight": random(2, 3)}, {"c.weight": random(2, 3)})


def test_two_tensors_that_may_both_be_meant_are_refused():
    weights = {
        "a.weight": random(2, 3),
        "module.a.weight": random(2, 3),
        "module.b.weight": random(2),
    }
    with pytest.raises(ModelError, match=r"may both be the model's 'a\.weight'"):
        overlay_of({"a.weight": random(2, 3), "b.weight": random(2)}, weights)


def test_what_was_left_on_either_side_is_said():
    notes = overlay_of(
        {"a.weight": random(2, 3), "b.weight": random(2, 3)},
        {"a.weight": random(2, 3), "c.weight": random(2, 3)},
    ).notes
    assert notes == (
        "the given weights gave 1 of the model's 2 weights and biases; as they were: 'b.weight'",
        "the model has no place for 'c.weight' of the given weights",
    )


def test_nothing_in_common_is_an_error_that_shows_names_of_both():
    with pytest.raises(ModelError, match=r"there are 'x.weight', and the model has 'a.bias'"):
        overlay_of({"a.bias": random(3)}, {"x.weight": random(2, 3)})


def test_a_shape_that_does_not_fit_names_both_tensors():
    with pytest.raises(ModelError, match=r"'a.weight' of the given weights is 2x3, but .* is 4x5"):
        overlay_of({"a.weight": random(4, 5)}, {"a.weight": random(2, 3)}, matrix=True)


def test_matrices_may_lie_transposed_and_others_may_not():
    weight = random(2, 3)
    overlay = overlay_of({"a.weight": random(3, 2)}, {"a.weight": weight}, matrix=True)
    assert np.array_equal(overlay.values["a.weight"], weight.T)
    assert "laid over transposed" in overlay.notes[-1]
    with pytest.raises(ModelError, match="is 2x3, but"):
        overlay_of({"a.weight": random(3, 2)}, {"a.weight": weight})


def test_a_square_matrix_lies_as_the_others_that_were_named_alike():
    square, oblong = random(3, 3), random(2, 3)
    weights = {"a.weight": square, "b.weight": oblong}
    kept = overlay_of({"a.weight": square, "b.weight": oblong}, weights, matrix=True)
    assert np.array_equal(kept.values["a.weight"], square)
    turned = overlay_of({"a.weight": square, "b.weight": oblong.T}, weights, matrix=True)
    assert np.array_equal(turned.values["a.weight"], square.T)


def test_a_square_matrix_among_others_that_disagree_is_refused():
    square, oblong = random(3, 3), random(2, 3)
    with pytest.raises(ModelError, match=r"'a.weight' .* is square, and may or may not"):
        overlay_of(
            {"a.weight": square, "b.weight": oblong, "c.weight": oblong.T},
            {"a.weight": square, "b.weight": oblong, "c.weight": oblong},
            matrix=True,
        )


# Inspection --------------------------------------------------------------------------------------


def test_inspect_profiles_a_checkpoint_without_a_graph(tmp_path):
    dense = random(64, 64)
    order = np.argsort(random(1024, 4, seed=7), axis=1)
    halves = np.where(order < 2, dense.reshape(-1, 4), np.float32(0))
    tensors = {
        "dense.weight": dense,
        "conv.weight": pruned(8, 4, 3, 3),
        "conv.bias": random(8),
        "quantised.weight": np.zeros((4, 8), np.int8),
        **two_four_bitmask("half", halves.reshape(64, 64)),
    }
    numpy_files.save_file(tensors, tmp_path / "model.safetensors")
    report = ts.inspect(tmp_path / "model.safetensors")
    layers = {layer.name: layer for layer in report.layers}
    assert set(layers) == {"dense", "conv", "half"}
    assert layers["half"].pattern == "2:4"
    assert layers["conv"].op == "conv2d"
    assert layers["conv"].nnz == np.count_nonzero(tensors["conv.weight"])
    assert any("'quantised.weight' is left out: it is quantised" in note for note in report.notes)


def test_a_checkpoint_is_no_model(tmp_path):
    numpy_files.save_file({"a.weight": random(3, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds weights without a graph"):
        ts.load(tmp_path / "x.safetensors")
