"""The zoo builds networks that ONNX Runtime accepts, with activations of a sane scale."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tvm_sparse import zoo
from tvm_sparse.errors import ModelError
from tvm_sparse.pruning import prune

ort = pytest.importorskip("onnxruntime")

# Big, and told apart from their neighbours by nothing that a small one does not show.
BIG = {"bert-base", "vgg19", "zfnet512", "bvlc_alexnet"}
# Builder options, output shape.
SMALL = {
    "mobilenet_v1": ({"size": 64}, (1, 1000)),
    "mobilenet_v2": ({"size": 64}, (1, 1000)),
    "mlp": ({"batch": 7}, (7, 10)),
    "single_matmul": ({}, (128, 768)),
    "single_conv": ({"stride": 2}, (1, 128, 14, 14)),
    "densenet121": ({}, (1, 1000, 1, 1)),
    "inception_v1": ({}, (1, 1000)),
    "inception_v2": ({}, (1, 1000)),
    "resnet50": ({}, (1, 1000)),
    "shufflenet": ({}, (1, 1000)),
    "squeezenet": ({}, (1, 1000, 1, 1)),
}


def run(model: onnx.ModelProto, *shape: int) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    data = session.get_inputs()[0]
    x = np.random.default_rng(0).standard_normal(shape or data.shape).astype(np.float32)
    return session.run(None, {data.name: x})[0]


def test_every_network_is_tried_here_or_known_to_be_big():
    assert set(zoo.ZOO) == set(SMALL) | BIG
    assert set(zoo.LIGHT_MODELS) <= set(zoo.ZOO)


@pytest.mark.parametrize("name", SMALL)
def test_networks_run_and_their_answers_keep_a_sane_scale(name):
    options, shape = SMALL[name]
    model = zoo.build(name, **options)
    onnx.checker.check_model(model)
    y = run(model)
    assert y.shape == shape
    assert np.isfinite(y).all()
    ends_in_softmax = model.graph.node[-1].op_type == "Softmax" or name == "squeezenet"
    if ends_in_softmax:
        assert np.allclose(y.sum(), 1, atol=1e-4)
        assert y.max() < 0.9, "a saturated softmax hides every error before it"
    else:
        assert 0.05 < np.sqrt(np.mean(y**2)) < 20


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    first, again, other = (zoo.mlp(seed=seed).SerializeToString() for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["shufflenet", "squeezenet", "inception_v1"])
def test_light_models_take_any_batch(name):
    fixed = zoo.light_model(name, batch=2)
    assert run(fixed).shape[0] == 2
    symbolic = zoo.light_model(name, batch="n")
    assert run(symbolic, 3, 3, 224, 224).shape[0] == 3


def test_an_mlp_takes_a_symbolic_batch():
    assert run(zoo.mlp(batch="N"), 5, 784).shape == (5, 10)


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("symbolic", [False, True])
def test_bert_runs_in_every_form_that_it_is_built_in(opset, symbolic):
    options = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "seq": 9}
    model = zoo.bert_encoder(**options, symbolic=symbolic, opset=opset)
    onnx.checker.check_model(model)
    assert run(model, 1, 9, 32).shape == (1, 9, 32)
    kinds = {node.op_type for node in model.graph.node}
    assert ("LayerNormalization" in kinds) == (opset >= 17)


def test_bert_gives_the_same_answer_with_layer_norm_whole_and_in_parts():
    options = {"layers": 1, "hidden": 32, "heads": 4, "ffn": 64, "seq": 9}
    whole = run(zoo.bert_encoder(**options, opset=17))
    parts = run(zoo.bert_encoder(**options, opset=13))
    assert np.abs(whole - parts).max() < 1e-4


@pytest.mark.parametrize("builder", [zoo.mobilenet_v1, zoo.mobilenet_v2])
def test_mobilenets_come_with_batch_norm_where_asked(builder):
    model = builder(batch_norm=True, size=64)
    onnx.checker.check_model(model)
    assert np.isfinite(run(model)).all()
    assert "BatchNormalization" in {node.op_type for node in model.graph.node}


def test_batch_norm_statistics_are_plausible():
    values = {
        t.name: numpy_helper.to_array(t) for t in zoo.light_model("resnet50").graph.initializer
    }
    scales = [v for name, v in values.items() if name.endswith("_bn_s_0")]
    variances = [v for name, v in values.items() if name.endswith("_bn_riv_0")]
    assert len(scales) == len(variances) == 53
    assert all((0.8 <= v).all() and (v <= 1.2).all() for v in scales)
    assert all((0.5 <= v).all() and (v <= 1.5).all() for v in variances)


def test_pruned_weights_are_as_uneven_as_trained_ones():
    model = prune(zoo.single_conv(256, 256, 14), sparsity=0.9)
    weight = next(
        numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "conv.weight"
    )
    empty_kernels = (weight.reshape(256 * 256, 9) == 0).all(axis=1).mean()
    assert 0.55 < empty_kernels < 0.72, "independent weights would leave 39 % empty"
    per_row = np.count_nonzero(weight.reshape(256, -1), axis=1)
    assert per_row.std() / per_row.mean() > 0.15


def test_unknown_networks_are_refused_in_words():
    with pytest.raises(ModelError, match="no network 'gpt'"):
        zoo.build("gpt")
    with pytest.raises(ModelError, match="no light model 'gpt'"):
        zoo.light_model("gpt")
    with pytest.raises(ModelError, match="5 heads do not divide 32"):
        zoo.bert_encoder(hidden=32, heads=5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["mlp", "single_matmul", "single_conv", "mobilenet_v1"])
def test_networks_are_built_in_half_precision(name, dtype):
    model = zoo.build(name, dtype=dtype)
    onnx.checker.check_model(model)
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert {str(value.dtype) for value in weights} == {dtype}
    full = [numpy_helper.to_array(tensor) for tensor in zoo.build(name).graph.initializer]
    for rounded, value in zip(weights, full, strict=True):
        assert np.array_equal(rounded, value.astype(rounded.dtype))
    kinds = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(weights[0].dtype)}


def test_networks_are_built_in_no_other_type():
    with pytest.raises(ModelError, match="to float16 or bfloat16, not to float64"):
        zoo.single_matmul(dtype="float64")
