"""Pruning cuts exactly what its text says, where it says so, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pruning_support import gaussian, matmul_model, weights_of

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.errors import ModelError, SparseError
from tvm_sparse.files import read_onnx, save_onnx
from tvm_sparse.pruning import (
    parse_pattern,
    prunable_layers,
    prune,
    prune_with_report,
)

FAST = settings(max_examples=40, deadline=None)


def conv_model(weight: np.ndarray, groups: int = 1) -> onnx.ModelProto:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=groups)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph)


shapes = st.tuples(st.integers(1, 23), st.integers(1, 23))
shares = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.floats(0, 0.999))
seeds = st.integers(0, 2**16)


@FAST
@given(shapes, shares, seeds)
def test_unstructured_cuts_exactly_the_rounded_share(shape, share, seed):
    weight = gaussian(seed, *shape)
    pruned = weights_of(prune(matmul_model(weight), "unstructured", share))["w0"]
    assert np.count_nonzero(pruned == 0) == round(share * weight.size)
    assert np.array_equal(pruned[pruned != 0], weight[pruned != 0])


@FAST
@given(shapes, shares, seeds)
def test_every_element_that_goes_is_no_larger_than_any_that_stays(shape, share, seed):
    weight = gaussian(seed, *shape)
    kept = weights_of(prune(matmul_model(weight), "unstructured", share))["w0"] != 0
    if kept.any() and not kept.all():
        assert np.abs(weight[~kept]).max() <= np.abs(weight[kept]).min()


@FAST
@given(st.lists(shapes, min_size=2, max_size=4), shares, seeds)
def test_global_scope_counts_over_all_layers_and_layer_scope_in_each(shapes, share, seed):
    weights = [gaussian(seed + i, *shape) * (i + 1) for i, shape in enumerate(shapes)]
    together = weights_of(prune(matmul_model(*weights), "unstructured", share, "global"))
    total = sum(w.size for w in weights)
    zeros = sum(int(np.count_nonzero(w == 0)) for w in together.values())
    assert zeros == round(share * total)
    alone = weights_of(prune(matmul_model(*weights), "unstructured", share, "layer"))
    for index, weight in enumerate(weights):
        assert np.count_nonzero(alone[f"w{index}"] == 0) == round(share * weight.size)


def test_global_scope_takes_more_from_the_layer_of_smaller_weights():
    small, large = 0.1 * gaussian(0, 32, 32), gaussian(1, 32, 32)
    pruned = weights_of(prune(matmul_model(small, large), "unstructured", 0.5, "global"))
    assert np.count_nonzero(pruned["w0"]) < 0.2 * small.size
    assert np.count_nonzero(pruned["w1"]) > 0.8 * large.size


def test_a_layer_that_loses_everything_is_said():
    tiny, large = 0.001 * gaussian(0, 8, 8), gaussian(1, 8, 8)
    report = prune_with_report(matmul_model(tiny, large), sparsity=0.5)
    assert [note[:36] for note in report.notes] == ["layer 'm0' has no nonzero weight lef"]


@FAST
@given(shapes, shares, seeds)
def test_ties_are_cut_to_the_exact_count_and_by_the_seed_alone(shape, share, seed):
    model = matmul_model(np.ones(shape, np.float32))
    first, again = (weights_of(prune(model, "unstructured", share, seed=seed)) for _ in range(2))
    assert np.array_equal(first["w0"], again["w0"])
    assert np.count_nonzero(first["w0"] == 0) == round(share * np.prod(shape))


@FAST
@given(shapes, st.floats(0, 1), shares, seeds)
def test_zeros_that_are_there_already_count_as_cut(shape, before, share, seed):
    weight = gaussian(seed, *shape)
    weight[np.random.default_rng(seed).random(shape) < before] = 0
    pruned = weights_of(prune(matmul_model(weight), "unstructured", share))["w0"]
    expected = max(np.count_nonzero(weight == 0), round(share * weight.size))
    assert np.count_nonzero(pruned == 0) == expected


@FAST
@given(
    st.integers(1, 9),
    st.integers(1, 19),
    st.sampled_from([1, 3]),
    st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)]),
    seeds,
)
def test_n_of_m_keeps_the_n_largest_of_every_group_of_input_channels(out, inp, k, nm, seed):
    n, m = nm
    weight = gaussian(seed, out, inp, k, k)
    pruned = weights_of(prune(conv_model(weight), f"{n}:{m}"))["w"]
    for start in range(0, inp, m):
        group, kept = weight[:, start : start + m], pruned[:, start : start + m] != 0
        size = group.shape[1]
        assert (kept.sum(axis=1) == min(n, size)).all()
        ranks = np.argsort(np.argsort(-np.abs(group), axis=1), axis=1)
        assert np.array_equal(kept, ranks < n)


def test_n_of_m_runs_along_the_input_features_of_a_matmul():
    pruned = weights_of(prune(matmul_model(gaussian(0, 16, 6)), "2:4"))["w0"]
    assert (np.count_nonzero(pruned.reshape(4, 4, 6), axis=1) == 2).all()


@FAST
@given(shapes, st.integers(1, 8), st.integers(1, 8), shares, seeds)
def test_blocks_go_as_a_whole_and_in_the_exact_number(shape, rows, columns, share, seed):
    weight = gaussian(seed, *shape)  # stored as [input, output]
    pruned = weights_of(prune(matmul_model(weight), f"block:{rows}x{columns}", share))["w0"].T
    empty, total = 0, 0
    for r in range(0, pruned.shape[0], rows):
        for c in range(0, pruned.shape[1], columns):
            block = pruned[r : r + rows, c : c + columns]
            assert (block == 0).all() or (block != 0).all()
            empty += not block.any()
            total += 1
    assert empty == round(share * total)


@FAST
@given(shapes, st.integers(1, 9), shares, seeds)
def test_a_vector_is_a_block_of_one_column(shape, length, share, seed):
    model = matmul_model(gaussian(seed, *shape))
    vector = weights_of(prune(model, f"vector:{length}", share))["w0"]
    block = weights_of(prune(model, f"block:{length}x1", share))["w0"]
    assert np.array_equal(vector, block)


@FAST
@given(st.integers(1, 17), st.integers(1, 9), shares, seeds)
def test_channels_go_as_whole_output_rows_and_shapes_stay(out, inp, share, seed):
    weight = gaussian(seed, out, inp, 3, 3)
    pruned = weights_of(prune(conv_model(weight), "channel", share))["w"]
    norms = np.sqrt((weight**2).sum(axis=(1, 2, 3)))
    empty = ~pruned.any(axis=(1, 2, 3))
    assert pruned.shape == weight.shape
    assert empty.sum() == round(share * out)
    if empty.any() and not empty.all():
        assert norms[empty].max() <= norms[~empty].min()


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "channel", "vector:4"])
def test_nan_and_infinity_rank_as_the_largest(pattern):
    weight = gaussian(0, 8, 8)
    weight[:, 3] = np.nan
    weight[:, 1] = np.inf
    pruned = weights_of(prune(matmul_model(weight), pattern, 0.5))["w0"]
    assert np.isnan(pruned[:, 3]).all()
    assert np.isinf(pruned[:, 1]).all()


def test_negative_zero_is_a_zero():
    weight = np.array([[-0.0, 1.0], [2.0, -3.0]], np.float32)
    cut = prune_with_report(matmul_model(weight), "unstructured", 0.25).layers[0]
    assert (cut.zeros_before, cut.zeros_after) == (1, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_keep_their_type(dtype):
    pruned = weights_of(prune(matmul_model(gaussian(0, 8, 8).astype(dtype)), sparsity=0.5))["w0"]
    assert pruned.dtype == dtype
    assert np.count_nonzero(pruned) == 32


def test_bfloat16_weights_are_pruned():
    model = matmul_model(gaussian(0, 8, 8))
    tensor = helper.make_tensor("w0", TensorProto.BFLOAT16, [8, 8], gaussian(0, 64).tolist())
    model.graph.initializer[0].CopyFrom(tensor)
    pruned = weights_of(prune(model, sparsity=0.75))["w0"]
    assert np.count_nonzero(pruned.astype(np.float32)) == 16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_pruned_and_written_in_their_type(tmp_path, dtype):
    before = zoo.mlp(sizes=(16, 12, 8), dtype=dtype)
    weight = numpy_helper.to_array(before.graph.initializer[0]).copy()
    weight[0, :4] = [-0.0, np.nan, np.inf, -np.inf]
    tensor = before.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    save_onnx(before, tmp_path / "model.onnx")
    pruned = prune(str(tmp_path / "model.onnx"), sparsity=0.75, scope="layer")
    save_onnx(pruned, tmp_path / "pruned.onnx")
    pruned = weights_of(onnx.load(tmp_path / "pruned.onnx"))[tensor.name]
    assert str(pruned.dtype) == dtype
    assert np.count_nonzero(pruned) == round(0.25 * pruned.size)
    assert np.isnan(pruned[0, 1]) and np.isposinf(pruned[0, 2]) and np.isneginf(pruned[0, 3])
    kept = pruned != 0
    assert np.array_equal(pruned[kept], weight[kept], equal_nan=True)
    report = ts.inspect(str(tmp_path / "pruned.onnx"))
    assert {layer.dtype for layer in report.layers} == {dtype}
    assert [layer.density for layer in report.layers] == pytest.approx([0.25, 0.25], abs=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loaded_model_in_half_precision_is_pruned(dtype):
    model = ts.load(zoo.single_matmul(8, 16, 4, dtype=dtype))
    pruned = prune(model, sparsity=0.5)
    [weight] = pruned.params.values()
    assert str(weight.dtype) == dtype
    assert np.count_nonzero(weight) == weight.size // 2
    assert pruned.digest() != model.digest()
    assert pruned.digest() == prune(model, sparsity=0.5).digest()


def test_the_given_model_is_not_changed():
    model = matmul_model(gaussian(0, 8, 8))
    before = model.SerializeToString()
    prune(model, sparsity=0.5)
    assert model.SerializeToString() == before


def test_biases_norms_and_embeddings_stay():
    model = zoo.bert_encoder(layers=1, hidden=32, heads=2, ffn=64, seq=8)
    table = numpy_helper.from_array(gaussian(3, 11, 32), "table")
    model.graph.initializer.append(table)
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [1]))
    model.graph.node.insert(0, helper.make_node("Gather", ["table", "ids"], ["embedded"]))
    before, after = weights_of(model), weights_of(prune(model, sparsity=0.9))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    parts = ("query", "key", "value", "output")
    expected = {f"encoder.layer.0.attention.{part}.weight" for part in parts}
    expected |= {f"encoder.layer.0.{part}.weight" for part in ("intermediate", "output")}
    assert changed == expected


def test_a_matmul_weight_shared_with_an_embedding_stays_and_the_report_says_so():
    model = matmul_model(gaussian(0, 8, 8), gaussian(1, 8, 8))
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [1]))
    model.graph.node.append(helper.make_node("Gather", ["w0", "ids"], ["e"], name="embed"))
    report = prune_with_report(model, sparsity=0.5)
    assert report.kept == {"m0": "its weight 'w0' also feeds the Gather 'embed'"}
    assert np.array_equal(weights_of(report.model)["w0"], gaussian(0, 8, 8))


def test_a_weight_shared_by_two_layers_is_cut_once_under_both_names():
    model = matmul_model(gaussian(0, 8, 8))
    model.graph.node.append(helper.make_node("MatMul", ["y0", "w0"], ["z"], name="again"))
    report = prune_with_report(model, sparsity=0.5)
    assert [cut.layer.name for cut in report.layers] == ["m0, again"]
    assert prune_with_report(model, sparsity=0.5, skip=["again"]).kept == {
        "m0, again": "skip names it ('again')"
    }


def test_skip_takes_names_and_patterns_and_says_what_matches_nothing():
    model = zoo.mobilenet_v1(size=32)
    skip = ["stem", "*/depthwise", "nosuch"]
    report = prune_with_report(model, sparsity=0.9, skip=skip)
    assert set(report.kept) == {"stem", *(f"block{i}/depthwise" for i in range(1, 14))}
    assert report.notes == ("skip 'nosuch' matches no layer",)
    names = {layer.name for layer in prunable_layers(model) if layer.is_depthwise}
    assert names == {f"block{i}/depthwise" for i in range(1, 14)}
    assert report.sparsity == pytest.approx(0.9, abs=1e-5)


def gemm_model(weight: np.ndarray, **attributes: int) -> onnx.ModelProto:
    model = matmul_model(weight)
    node = helper.make_node("Gemm", ["x0", "w0"], ["y0"], name="gemm", **attributes)
    model.graph.node[0].CopyFrom(node)
    return model


def test_gemm_rows_are_output_features_whichever_way_the_weight_lies():
    weight = gaussian(0, 8, 16)
    turned = weights_of(prune(gemm_model(weight, transB=1), "channel", 0.5))["w0"]
    plain = weights_of(prune(gemm_model(weight.T.copy()), "channel", 0.5))["w0"]
    assert np.array_equal(turned, plain.T)
    assert np.count_nonzero(turned.any(axis=1)) == 4


def test_weights_are_found_through_transpose_and_reshape():
    model = gemm_model(gaussian(0, 1, 1, 8, 16), transB=1)
    model.graph.initializer.append(numpy_helper.from_array(np.array([8, 16]), "shape"))
    model.graph.node.insert(0, helper.make_node("Reshape", ["w0", "shape"], ["flat"]))
    model.graph.node.insert(1, helper.make_node("Transpose", ["flat"], ["turned"], perm=[1, 0]))
    model.graph.node.insert(2, helper.make_node("Transpose", ["turned"], ["back"], perm=[1, 0]))
    model.graph.node[3].input[1] = "back"
    pruned = weights_of(prune(model, "channel", 0.25))["w0"]
    assert pruned.shape == (1, 1, 8, 16)
    assert np.count_nonzero(pruned[0, 0].any(axis=1)) == 6


def test_a_constant_node_is_a_weight_too():
    model = matmul_model(gaussian(0, 8, 8))
    constant = helper.make_node("Constant", [], ["w0"], value=model.graph.initializer[0])
    del model.graph.initializer[:]
    model.graph.node.insert(0, constant)
    pruned = prune(model, sparsity=0.5)
    array = numpy_helper.to_array(pruned.graph.node[0].attribute[0].t)
    assert np.count_nonzero(array) == 32


def test_a_sparse_initializer_is_a_weight_too():
    dense = gaussian(0, 8, 8)
    dense[np.abs(dense) < 0.3] = 0
    for indices in (np.flatnonzero(dense), np.argwhere(dense)):
        model = matmul_model(dense)
        del model.graph.initializer[:]
        values = numpy_helper.from_array(dense[dense != 0], "w0")
        places = numpy_helper.from_array(indices.astype(np.int64), "w0_indices")
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, places, list(dense.shape))
        )
        pruned = prune(model, sparsity=0.75)
        assert not pruned.graph.sparse_initializer
        expected = weights_of(prune(matmul_model(dense), sparsity=0.75))["w0"]
        assert np.array_equal(weights_of(pruned)["w0"], expected)


def test_a_quantised_weight_stays_and_the_report_says_so():
    model = matmul_model(gaussian(0, 8, 8), gaussian(1, 8, 8))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((8, 8), np.int8), "w0"))
    assert prune_with_report(model, sparsity=0.5).kept == {"m0": "its weight is int8"}


def test_weights_that_are_computed_are_named():
    path = zoo.single_conv(4, 4, 8)
    path.graph.node.insert(0, helper.make_node("Abs", ["conv.weight"], ["absolute"]))
    path.graph.node[1].input[1] = "absolute"
    with pytest.raises(ModelError, match="conv: its weight is computed by a Abs"):
        prune(path, sparsity=0.5)


def test_empty_weights_are_no_trouble():
    model = matmul_model(np.zeros((0, 4), np.float32), gaussian(0, 4, 4))
    for pattern in ("unstructured", "2:4", "block:2x2", "channel", "vector:2"):
        assert weights_of(prune(model, pattern, 0.5))["w0"].shape == (0, 4)


def test_a_model_without_weights_is_refused_in_words():
    node = helper.make_node("Relu", ["x"], ["y"])
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))
    with pytest.raises(ModelError, match="no weight of a Conv, Gemm or MatMul"):
        prune(model)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused_in_words(share):
    with pytest.raises(SparseError, match="from 0 to below 1"):
        prune(matmul_model(gaussian(0, 4, 4)), sparsity=share)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("4:2", "N below M"),
        ("0:4", "N below M"),
        ("block:0x4", "at least one element"),
        ("vector:0", "at least one element"),
        ("blocks", "there are unstructured, N:M"),
        ("", "unknown pattern"),
    ],
)
def test_patterns_that_make_no_sense_are_refused_in_words(pattern, words):
    with pytest.raises(SparseError, match=words):
        parse_pattern(pattern)


def test_n_of_m_refuses_another_sparsity_in_words():
    model = matmul_model(gaussian(0, 8, 8))
    assert np.count_nonzero(weights_of(prune(model, "2:4", 0.5))["w0"]) == 32
    with pytest.raises(SparseError, match=r"2:4 leaves 0\.5 zero by itself"):
        prune(model, "2:4", 0.9)


def test_an_unknown_scope_is_refused_in_words():
    with pytest.raises(SparseError, match="there are global, layer, erk and row"):
        prune(matmul_model(gaussian(0, 4, 4)), scope="network")  # type: ignore[arg-type]


def test_a_path_is_read_with_its_external_data(tmp_path):
    model = matmul_model(gaussian(0, 64, 64))
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    pruned = prune(path, sparsity=0.5)
    assert np.count_nonzero(weights_of(pruned)["w0"]) == 2048
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"w\.bin"):
        prune(path, sparsity=0.5)


@pytest.mark.parametrize("content", [b"not a model at all", b"", b"\x08\x07\x12\xff\xff"])
def test_a_file_that_is_no_model_is_refused_in_words(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.onnx' is not an ONNX model"):
        read_onnx(path)


def test_a_missing_file_and_a_folder_are_refused_in_words(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        prune(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot read"):
        prune(tmp_path)


def test_something_else_is_refused_in_words():
    with pytest.raises(ModelError, match="this is a int"):
        prune(7)


def test_the_report_reads_as_a_table_and_as_plain_data():
    report = prune_with_report(zoo.mlp(sizes=(32, 16, 8)), sparsity=0.75, skip=["fc2"])
    text = str(report)
    assert "fc1" in text and "75.0%" in text
    assert "left alone: fc2: skip names it ('fc2')" in text
    plain = report.to_dict()
    assert plain["layers"][0]["name"] == "fc1"
    assert plain["layers"][0]["zeros"] == 384
