"""What the canonical form does to weights, and that it does not change what is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from load_support import assert_close, onnx_model, ops_of, random, run_model, run_onnx
from onnx import helper
from tvm import relax
from tvm_sparse.passes.canonicalize import canonicalize, check_canonical
from tvm_sparse.passes.rewrite_main import bindings_of, main_of

from tvm_sparse.frontends.loading import load
from tvm_sparse.frontends.relax import finish
from tvm_sparse.model import Model, TensorSpec

node = helper.make_node
few = settings(max_examples=8, deadline=None)


def batch_norm(source: str, target: str, channels: int, tag: str = "bn") -> Any:
    """One BatchNormalization node and its weights."""
    names = [f"{tag}.{part}" for part in ("g", "b", "m", "v")]
    values = [random(channels, seed=i + 7) for i in range(4)]
    values[3] = np.abs(values[3]) + np.float32(0.5)
    return node("BatchNormalization", [source, *names], [target]), dict(
        zip(names, values, strict=True)
    )


def conv_bn(channels: int, kernel: int, bias: bool, group: int = 1) -> onnx.ModelProto:
    bn, weights = batch_norm("a", "y", channels)
    weights["w"] = random(channels, 4 // group, kernel, kernel)
    weights["w"].reshape(-1)[::3] = 0
    if bias:
        weights["c"] = random(channels, seed=3)
    nodes = [node("Conv", ["x", "w", "c"][: 2 + bias], ["a"], name="conv", group=group), bn]
    return onnx_model(nodes, weights, {"x": (2, 4, 7, 7)})


@few
@given(
    channels=st.sampled_from([4, 8, 12]),
    kernel=st.integers(1, 3),
    bias=st.booleans(),
    group=st.sampled_from([1, 2, 4]),
)
def test_batch_norm_goes_into_the_convolution_before_it(channels, kernel, bias, group):
    proto = conv_bn(channels, kernel, bias, group)
    model = load(proto)
    assert ops_of(model) == ["nn.conv2d", "add"]
    assert check_canonical(model) == []
    assert [value.shape for value in model.params.values()][1] == (1, channels, 1, 1)
    x = random(2, 4, 7, 7, seed=5)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def test_a_pruned_weight_stays_exactly_zero_under_folding():
    proto = conv_bn(8, 3, bias=True)
    before = onnx.numpy_helper.to_array(proto.graph.initializer[4])
    after = load(proto).params["w"]
    assert before.shape == after.shape
    np.testing.assert_array_equal(before == 0, after == 0)


def test_folding_rounds_once():
    proto = conv_bn(8, 3, bias=False)
    values = {t.name: onnx.numpy_helper.to_array(t).astype("f8") for t in proto.graph.initializer}
    scale = values["bn.g"] / np.sqrt(values["bn.v"] + float(np.float32(1e-5)))
    exact = values["w"] * scale[:, None, None, None]
    np.testing.assert_array_max_ulp(load(proto).params["w"], exact.astype("f4"), maxulp=1)


def test_a_convolution_with_two_users_keeps_its_weight():
    bn, weights = batch_norm("a", "n", 6)
    weights["w"] = random(6, 4, 1, 1)
    nodes = [node("Conv", ["x", "w"], ["a"]), bn, node("Add", ["a", "n"], ["y"])]
    proto = onnx_model(nodes, weights, {"x": (2, 4, 7, 7)})
    model = load(proto)
    assert ops_of(model) == ["nn.conv2d", "multiply", "add", "add"]
    np.testing.assert_array_equal(model.params["w"], weights["w"])
    x = random(2, 4, 7, 7, seed=5)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 6), (3, 5, 6, 7)])
def test_batch_norm_elsewhere_is_a_multiply_and_an_add(shape):
    bn, weights = batch_norm("r", "y", 5)
    proto = onnx_model([node("Relu", ["x"], ["r"]), bn], weights, {"x": shape})
    model = load(proto)
    assert ops_of(model) == ["nn.relu", "multiply", "add"]
    vector = (5,) if len(shape) == 2 else (1, 5, *[1] * (len(shape) - 2))
    assert {value.shape for value in model.params.values()} == {vector}
    x = random(*shape)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def test_a_chain_of_channel_wise_steps_becomes_one_weight_and_one_bias():
    bn, weights = batch_norm("a", "b", 6)
    weights |= {"w": random(6, 4, 3, 3), "s": random(6, 1, 1), "t": random(1, 6, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        bn,
        node("Mul", ["s", "b"], ["c"]),
        node("Sub", ["c", "t"], ["d"]),
        node("Div", ["d", "s"], ["e"]),
        node("Relu", ["e"], ["y"]),
    ]
    proto = onnx_model(nodes, weights, {"x": (2, 4, 7, 7)})
    model = load(proto)
    assert ops_of(model) == ["nn.conv2d", "add", "nn.relu"]
    x = random(2, 4, 7, 7, seed=5)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0], steps=256)


def test_batch_norm_goes_into_a_matmul_too():
    bn, weights = batch_norm("b", "y", 6)
    weights |= {"w": random(4, 6), "c": random(6)}
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["c", "a"], ["b"]), bn]
    proto = onnx_model(nodes, weights, {"x": (3, 4)})
    model = load(proto)
    assert ops_of(model) == ["matmul", "add"]
    x = random(3, 4)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def test_a_scale_that_is_not_finite_is_not_folded_over_zeros():
    weights = {"w": np.zeros((4, 6), np.float32), "s": np.full(6, np.inf, np.float32)}
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Mul", ["a", "s"], ["y"])]
    model = load(onnx_model(nodes, weights, {"x": (3, 4)}))
    assert not np.isnan(model.params["w"]).any()
    assert np.isnan(run_model(model, random(3, 4))[0]).all()


def test_a_network_that_returns_the_unfolded_convolution_still_does():
    bn, weights = batch_norm("a", "y", 6)
    weights["w"] = random(6, 4, 1, 1)
    proto = onnx_model(
        [node("Conv", ["x", "w"], ["a"]), bn], weights, {"x": (2, 4, 7, 7)}, ("y", "a")
    )
    x = random(2, 4, 7, 7)
    for actual, expected in zip(run_model(load(proto), x), run_onnx(proto, x=x), strict=True):
        assert_close(actual, expected)


def relax_model(body: Any, weights: dict[str, np.ndarray], shape: tuple[int, ...]) -> Model:
    """A model whose `main` is what `body` emits from an input and the weights."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    params = [relax.Var(k, relax.TensorType(v.shape, str(v.dtype))) for k, v in weights.items()]
    with builder.function("main", [x, *params], attrs={"num_input": 1}):
        with builder.dataflow():
            result = builder.emit_output(body(builder, x, *params))
        builder.emit_func_output(result)
    inputs = (TensorSpec("x", shape, "float32"),)
    return Model(builder.get(), weights, {}, inputs, ())


def test_a_broadcast_weight_is_looked_through_and_never_stored():
    def body(builder: Any, x: Any, w: Any) -> Any:
        wide = relax.op.broadcast_to(relax.op.permute_dims(w, [1, 0]), (128, 96, 80))
        return relax.op.matmul(relax.op.broadcast_to(x, (128, 2, 96)), wide)

    weight = random(80, 96)
    model = finish(relax_model(body, {"w": weight}, (128, 2, 96)))
    assert ops_of(model) == ["matmul"]
    assert model.params["w"].shape == (96, 80)
    assert check_canonical(model) == []
    x = random(128, 2, 96, seed=1)
    assert_close(run_model(model, x)[0], x @ weight.T)


def test_a_weight_with_real_batch_dimensions_stays():
    def body(builder: Any, x: Any, w: Any) -> Any:
        return relax.op.matmul(x, w)

    model = finish(relax_model(body, {"w": random(3, 4, 5)}, (3, 2, 4)))
    assert model.params["w"].shape == (3, 4, 5)
    x = random(3, 2, 4)
    assert_close(run_model(model, x)[0], x @ model.params["w"])


def test_a_product_that_would_grow_beyond_the_limit_stays():
    def body(builder: Any, x: Any, u: Any, v: Any) -> Any:
        return relax.op.add(x, relax.op.multiply(u, v))

    weights = {"u": random(400, 1), "v": random(1, 300)}
    model = finish(relax_model(body, weights, (400, 300)))
    assert ops_of(model) == ["multiply", "add"]
    assert {value.size for value in model.params.values()} == {400, 300}


@few
@given(st.permutations(range(3)), st.booleans(), st.booleans())
def test_chains_over_a_weight_are_evaluated(axes, scaled, sliced):
    weight = random(4, 5, 6)

    def body(builder: Any, x: Any, w: Any, s: Any) -> Any:
        value = relax.op.permute_dims(w, axes)
        if scaled:
            value = relax.op.sqrt(relax.op.multiply(value, relax.op.multiply(value, s)))
        if sliced:
            value = relax.op.strided_slice(value, [0], [1], [4], [2])
        return relax.op.add(x, relax.op.expand_dims(value, [0]))

    expected = weight.transpose(axes)
    expected = np.sqrt(expected * (expected * np.float32(2))) if scaled else expected
    expected = expected[1:4:2] if sliced else expected
    shape = (1, *expected.shape)
    model = finish(relax_model(body, {"w": weight, "s": np.full(1, 2, np.float32)}, shape))
    assert ops_of(model) == ["add"]
    assert check_canonical(model) == []
    np.testing.assert_array_equal(model.params["w"], expected[None])


def test_integer_results_are_inline_constants():
    def body(builder: Any, x: Any, i: Any) -> Any:
        return relax.op.take(x, relax.op.astype(i, "int64"), axis=0)

    model = finish(relax_model(body, {"i": np.array([2, 0], np.int32)}, (4, 3)))
    assert ops_of(model) == ["take"]
    assert not model.params
    x = random(4, 3)
    np.testing.assert_array_equal(run_model(model, x)[0], x[[2, 0]])


def test_identities_on_activations_are_dropped_and_chains_merged():
    def body(builder: Any, x: Any) -> Any:
        y = relax.op.reshape(relax.op.broadcast_to(x, (2, 3, 4)), (2, 3, 4))
        y = relax.op.permute_dims(relax.op.permute_dims(y, [0, 2, 1]), [0, 2, 1])
        y = relax.op.reshape(relax.op.reshape(y, (6, 4)), (3, 8))
        return relax.op.multiply(relax.op.astype(y, "float32"), relax.const(1.0, "float32"))

    assert ops_of(finish(relax_model(body, {}, (2, 3, 4)))) == ["reshape"]


def test_a_constant_of_one_element_is_a_scalar_on_the_right():
    def body(builder: Any, x: Any, s: Any) -> Any:
        return relax.op.multiply(s, x)

    model = finish(relax_model(body, {"s": np.float32([[2]])}, (3, 4)))
    call = next(iter(bindings_of(main_of(model.mod)))).value
    assert call.args[1].ty.ndim == 0
    assert not model.params


def linear(builder: Any, x: Any, w: Any, b: Any) -> Any:
    """A linear layer on three dimensions, as PyTorch's decompositions write it."""
    flat = relax.op.reshape(x, (6, 8))
    product = relax.op.matmul(flat, relax.op.permute_dims(w))
    return relax.op.reshape(relax.op.nn.gelu(relax.op.add(b, product)), (2, 3, 5))


def test_reshapes_around_a_linear_layer_cancel():
    weights = {"w": random(5, 8), "b": random(5)}
    model = finish(relax_model(linear, weights, (2, 3, 8)))
    assert ops_of(model) == ["matmul", "add", "nn.gelu"]
    assert model.outputs[0].shape == (2, 3, 5)


def layer_norm_graph(variant: str, affine: bool) -> onnx.ModelProto:
    weights = {"two": np.float32(2), "eps": np.float32(1e-5), "g": random(16), "b": random(16)}
    nodes = [
        node("ReduceMean", ["x"], ["mu"], axes=[-1]),
        node("Sub", ["x", "mu"], ["d"]),
        node("Sub", ["x", "mu"], ["d2"]),
        {
            "pow": node("Pow", ["d", "two"], ["sq"]),
            "mul": node("Mul", ["d", "d"], ["sq"]),
            "twice": node("Pow", ["d2", "two"], ["sq"]),
        }[variant],
        node("ReduceMean", ["sq"], ["v"], axes=[-1]),
        node("Add", ["eps", "v"], ["ve"]),
        node("Sqrt", ["ve"], ["sd"]),
        node("Div", ["d", "sd"], ["n"]),
        node("Mul", ["g", "n"], ["gn"]),
        node("Add", ["gn", "b"], ["y"]),
    ]
    if not affine:
        nodes = [*nodes[:-2], node("Relu", ["n"], ["y"])]
    return onnx_model(nodes, weights, {"x": (2, "S", 16)})


@pytest.mark.parametrize("variant", ["pow", "mul", "twice"])
@pytest.mark.parametrize("affine", [True, False])
def test_decomposed_layer_norm_is_recognised(variant, affine):
    proto = layer_norm_graph(variant, affine)
    model = load(proto)
    assert ops_of(model) == ["nn.layer_norm"] + ["nn.relu"] * (not affine)
    assert check_canonical(model) == []
    x = random(2, 3, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


ROOTS = {
    "divided": [node("Sqrt", ["ve"], ["sd"]), node("Div", ["x", "sd"], ["n"])],
    "inverted": [
        node("Sqrt", ["ve"], ["sd"]),
        node("Div", ["one", "sd"], ["i"]),
        node("Mul", ["x", "i"], ["n"]),
    ],
    "reciprocal": [
        node("Sqrt", ["ve"], ["sd"]),
        node("Reciprocal", ["sd"], ["i"]),
        node("Mul", ["i", "x"], ["n"]),
    ],
}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("squared", ["pow", "mul"])
@pytest.mark.parametrize("scaled", [True, False])
def test_decomposed_root_mean_square_norm_is_recognised(root, squared, scaled):
    square = {"pow": node("Pow", ["x", "two"], ["sq"]), "mul": node("Mul", ["x", "x"], ["sq"])}
    weights = {"two": np.float32(2), "one": np.float32(1), "eps": np.float32(1e-5)}
    nodes = [
        square[squared],
        node("ReduceMean", ["sq"], ["v"], axes=[-1]),
        node("Add", ["v", "eps"], ["ve"]),
        *ROOTS[root],
        node("Mul", ["g", "n"], ["y"]) if scaled else node("Relu", ["n"], ["y"]),
    ]
    proto = onnx_model(nodes, {**weights, "g": random(16)}, {"x": (2, "S", 16)})
    model = load(proto)
    assert ops_of(model) == ["nn.rms_norm"] + ["nn.relu"] * (not scaled)
    assert check_canonical(model) == []
    x = random(2, 3, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize("change", ["another axis", "another value", "not kept"])
def test_what_is_almost_a_root_mean_square_norm_stays(change):
    axes = [1] if change == "another axis" else [-1]
    nodes = [
        node("Mul", ["x", "x"], ["sq"]),
        node("ReduceMean", ["sq"], ["v"], axes=axes, keepdims=int(change != "not kept")),
        node("Add", ["v", "eps"], ["ve"]),
        node("Sqrt", ["ve"], ["sd"]),
        node("Relu", ["x"], ["r"]),
        node("Div", ["r" if change == "another value" else "x", "sd"], ["y"]),
    ]
    proto = onnx_model(nodes, {"eps": np.float32(1e-5)}, {"x": (16, 16, 16)})
    model = load(proto)
    assert "nn.rms_norm" not in ops_of(model)
    x = random(16, 16, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize("sizes", [[4, 12], [8, 8], [3, 5, 8]])
def test_a_split_of_features_is_slices(sizes):
    names = [f"y{number}" for number in range(len(sizes))]
    nodes = [node("Split", ["x", "sizes"], names, axis=-1)]
    weights = {"sizes": np.asarray(sizes, np.int64)}
    proto = onnx_model(nodes, weights, {"x": (2, 3, 16)}, tuple(names))
    model = load(proto)
    assert ops_of(model) == ["strided_slice"] * len(sizes)
    x = random(2, 3, 16)
    for got, want in zip(run_model(model, x), run_onnx(proto, x=x), strict=True):
        assert_close(got, want)


ROOT_2, CUBIC, ROOT_2_OVER_PI = 2**0.5, 0.044715, (2 / np.pi) ** 0.5
GELU_BY_ERF = {
    "halved last": [
        ("Div", "x", ROOT_2, "u"),
        ("Erf", "u", "e"),
        ("Add", "e", 1.0, "s"),
        ("Mul", "x", "s", "p"),
        ("Mul", "p", 0.5, "y"),
    ],
    "halved first": [
        ("Mul", 0.5, "x", "h"),
        ("Mul", "x", 1 / ROOT_2, "u"),
        ("Erf", "u", "e"),
        ("Add", 1.0, "e", "s"),
        ("Mul", "s", "h", "y"),
    ],
    "divided by two": [
        ("Div", "x", ROOT_2, "u"),
        ("Erf", "u", "e"),
        ("Add", "e", 1.0, "s"),
        ("Div", "x", 2.0, "h"),
        ("Mul", "h", "s", "y"),
    ],
}
GELU_BY_TANH = {
    "power": [("Pow", "x", 3.0, "c"), ("Mul", "c", CUBIC, "k")],
    "products": [("Mul", "x", "x", "q"), ("Mul", "q", "x", "c"), ("Mul", CUBIC, "c", "k")],
}
_REST = [
    ("Add", "x", "k", "t"),
    ("Mul", "t", ROOT_2_OVER_PI, "u"),
    ("Tanh", "u", "e"),
    ("Add", "e", 1.0, "s"),
    ("Mul", "x", 0.5, "h"),
    ("Mul", "h", "s", "y"),
]


def formula(steps) -> onnx.ModelProto:
    """Build a graph from rows of an operator, its operands (numbers are constants), its result."""
    weights, nodes = {}, []
    for kind, *operands, result in steps:
        names = []
        for operand in operands:
            if not isinstance(operand, str):
                weights[f"n{len(weights)}"] = np.float32(operand)
                operand = f"n{len(weights) - 1}"
            names.append(operand)
        nodes.append(node(kind, names, [result]))
    return onnx_model(nodes, weights, {"x": (2, "S", 16)})


@pytest.mark.parametrize("steps", GELU_BY_ERF.values(), ids=list(GELU_BY_ERF))
def test_gelu_by_erf_is_recognised(steps):
    proto = formula(steps)
    model = load(proto)
    assert ops_of(model) == ["nn.gelu"]
    x = random(2, 3, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize("steps", GELU_BY_TANH.values(), ids=list(GELU_BY_TANH))
def test_gelu_by_tanh_is_recognised(steps):
    proto = formula([*steps, *_REST])
    model = load(proto)
    assert ops_of(model) == ["nn.gelu_tanh"]
    x = random(2, 3, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize(
    ("row", "instead"),
    [
        (0, ("Div", "x", 1.5, "u")),
        (2, ("Add", "e", 2.0, "s")),
        (4, ("Mul", "p", 0.25, "y")),
        (3, ("Mul", "u", "s", "p")),
    ],
)
def test_what_is_nearly_gelu_is_left_alone(row, instead):
    steps = list(GELU_BY_ERF["halved last"])
    steps[row] = instead
    proto = formula(steps)
    model = load(proto)
    assert "nn.gelu" not in ops_of(model)
    x = random(2, 3, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


@pytest.mark.parametrize("axes", [[1], [0, 1]])
def test_a_norm_over_other_axes_is_left_alone(axes):
    proto = layer_norm_graph("pow", True)
    for item in proto.graph.node:
        if item.op_type == "ReduceMean":
            item.attribute[0].CopyFrom(helper.make_attribute("axes", axes))
    model = load(proto)
    assert "nn.layer_norm" not in ops_of(model)
    x = random(2, 3, 16)
    assert_close(run_model(model, x)[0], run_onnx(proto, x=x)[0])


def test_canonicalising_again_changes_nothing():
    model = load(conv_bn(8, 3, bias=True))
    again = canonicalize(model)
    assert again.digest() == model.digest()
    assert ops_of(again) == ops_of(model)


def test_the_check_names_what_is_not_canonical():
    raw = relax_model(linear, {"w": random(5, 8), "b": random(5)}, (2, 3, 8))
    faults = check_canonical(raw)
    assert any("transforms a weight (permute_dims)" in fault for fault in faults)


def test_a_mask_of_any_size_is_folded_into_the_weight_that_it_hides():
    weight, mask = random(300, 260), random(300, 260, seed=1) > 0.5
    nodes = [
        node("Where", ["mask", "w", "zero"], ["masked"]),
        node("MatMul", ["x", "masked"], ["y"], name="layer"),
    ]
    weights = {"w": weight, "mask": mask, "zero": np.zeros((), np.float32)}
    model = load(onnx_model(nodes, weights, {"x": (2, 300)}))
    assert ops_of(model) == ["matmul"]
    [value] = model.params.values()
    assert np.array_equal(value, np.where(mask, weight, 0))
