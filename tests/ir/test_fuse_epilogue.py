"""What runs inside a weight's kernel, and where fusion stops."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from load_support import onnx_model, random, run_onnx
from onnx import TensorProto, helper
from tvm import relax
from tvm_sparse.passes.collect_weights import FusedSite, collect_weights

import tvm_sparse as ts
from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.errors import ModelError
from tvm_sparse.model import Model

W = random(16, 12) * 0.3


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def matmul_graph(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    inputs: dict[str, Any] | None = None,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    """Put nodes behind ``h = x @ w``."""
    first = node("MatMul", "x w", "h", name="fc")
    every = {"w": W, **(weights or {})}
    return onnx_model([first, *nodes], every, inputs or {"x": (5, 16)}, outputs)


def conv_graph(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], size: int = 6
) -> onnx.ModelProto:
    """Put nodes behind ``h = conv(x, w)`` with six output channels."""
    first = node("Conv", "x w", "h", name="conv", pads=[1, 1, 1, 1])
    every = {"w": random(6, 4, 3, 3) * 0.2, **weights}
    return onnx_model([first, *nodes], every, {"x": (1, 4, size, size)})


def sites_of(proto: onnx.ModelProto) -> list[FusedSite]:
    return collect_weights(ts.load(proto))


def fused(proto: onnx.ModelProto) -> list[str]:
    """What each weight's kernel takes in."""
    return [site.site.workload.epilogue.describe() for site in sites_of(proto)]


def agrees(proto: onnx.ModelProto, sizes: dict[str, int] | None = None) -> Model:
    """Compile with sparse kernels for all, and compare with ONNX Runtime."""
    model = ts.load(proto)
    names = {site.site.name: "register_tiled" for site in collect_weights(model)}
    plan = ts.plan(model, "x86-64-v3", threads=1, force=names)
    module = ts.compile(model, "x86-64-v3", plan, check=True)
    feed = {
        spec.name: random(*[(sizes or {}).get(d, d) for d in spec.shape], seed=3)
        for spec in model.inputs
    }
    got = module.run(feed)
    for name, want in zip(got, run_onnx(proto, **feed), strict=True):
        np.testing.assert_allclose(got[name], want, rtol=0, atol=3e-5 * (1 + np.abs(want).max()))
    return model


VECTOR = random(12, seed=1)

# Nodes behind h -> what is fused.
CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]] = {
    "bias on the right": ([node("Add", "h b", "y")], {"b": VECTOR}, "add"),
    "bias on the left": ([node("Add", "b h", "y")], {"b": VECTOR}, "add"),
    "vector minus h": ([node("Sub", "b h", "y")], {"b": VECTOR}, "subtract"),
    "vector with leading ones": (
        [node("Relu", "h", "r"), node("Mul", "r b", "y")],
        {"b": VECTOR[None]},
        "maximum+multiply",
    ),
    "relu": ([node("Relu", "h", "y")], {}, "maximum"),
    "clip": (
        [node("Clip", "h low high", "y")],
        {"low": np.float32(-0.5), "high": np.float32(0.75)},
        "maximum+minimum",
    ),
    "leaky relu": ([node("LeakyRelu", "h", "y", alpha=0.2)], {}, "multiply+maximum"),
    "sigmoid": ([node("Sigmoid", "h", "y")], {}, "sigmoid"),
    "silu": (
        [node("Sigmoid", "h", "s"), node("Mul", "h s", "y")],
        {},
        "sigmoid+multiply",
    ),
    "gelu in parts": (
        [
            node("Add", "h b", "a"),
            node("Div", "a root", "d"),
            node("Erf", "d", "e"),
            node("Add", "e one", "f"),
            node("Mul", "a f", "g"),
            node("Mul", "g half", "y"),
        ],
        {
            "b": VECTOR,
            "root": np.float32(np.sqrt(2)),
            "one": np.float32(1),
            "half": np.float32(0.5),
        },
        "add+gelu",
    ),
    "hard swish in parts": (
        [
            node("Add", "h three", "a"),
            node("Clip", "a zero six", "c"),
            node("Mul", "h c", "m"),
            node("Div", "m six", "y"),
        ],
        {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)},
        "add+maximum+minimum+multiply+divide",
    ),
    "square and cube": (
        [node("Pow", "h two", "a"), node("Pow", "a three", "y")],
        {"two": np.float32(2), "three": np.float32(3)},
        "multiply+multiply+multiply",
    ),
    "abs, negative": ([node("Abs", "h", "a"), node("Neg", "a", "y")], {}, "abs+negative"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_elementwise_operations_behind_a_weight_run_inside_its_kernel(name):
    nodes, weights, expected = CHAINS[name]
    proto = matmul_graph(nodes, weights)
    assert fused(proto) == [expected]
    agrees(proto)


@pytest.mark.parametrize("sides", ["h r", "r h"])
def test_a_residual_joins_on_either_side(sides):
    proto = matmul_graph(
        [node("Add", sides, "s"), node("Relu", "s", "y")], inputs={"x": (5, 16), "r": (5, 12)}
    )
    assert fused(proto) == ["add+maximum"]
    assert len(sites_of(proto)[0].fused.tensors) == 1
    agrees(proto)


def test_a_residual_that_is_used_twice_is_passed_once():
    proto = matmul_graph(
        [node("Add", "h r", "a"), node("Mul", "a r", "y")], inputs={"x": (5, 16), "r": (5, 12)}
    )
    assert fused(proto) == ["add+multiply"]
    assert len(sites_of(proto)[0].fused.tensors) == 1
    agrees(proto)


def test_the_input_can_be_its_own_residual():
    proto = onnx_model(
        [node("MatMul", "x w", "h"), node("Add", "h x", "y")],
        {"w": random(16, 16) * 0.2},
        {"x": (5, 16)},
    )
    assert fused(proto) == ["add"]
    agrees(proto)


def test_of_two_weights_that_are_added_one_takes_the_addition():
    proto = matmul_graph(
        [node("MatMul", "x v", "g"), node("Add", "h g", "s"), node("Relu", "s", "y")],
        {"v": random(16, 12, seed=5)},
    )
    assert sorted(fused(proto)) == ["", "add+maximum"]
    first, second = sites_of(proto)
    assert not first.fused.members & second.fused.members
    agrees(proto)


def test_two_weights_with_chains_of_their_own_share_no_operation():
    proto = matmul_graph(
        [
            node("Add", "h b", "p"),
            node("MatMul", "x v", "g"),
            node("Sigmoid", "g", "q"),
            node("Mul", "p q", "y"),
        ],
        {"b": VECTOR, "v": random(16, 12, seed=5)},
    )
    assert sorted(fused(proto)) == ["add+multiply", "sigmoid"]
    agrees(proto)


def test_the_chain_stops_before_a_value_that_is_needed_outside():
    proto = matmul_graph(
        [
            node("Add", "h b", "a"),
            node("Relu", "a", "r"),
            node("Softmax", "a", "s", axis=-1),
            node("Add", "r s", "y"),
        ],
        {"b": VECTOR},
    )
    assert fused(proto) == ["add"]
    agrees(proto)


def test_an_output_of_the_model_within_the_chain_ends_it():
    proto = matmul_graph(
        [node("Add", "h b", "a"), node("Relu", "a", "y")], {"b": VECTOR}, outputs=("a", "y")
    )
    assert fused(proto) == ["add"]
    agrees(proto)


def test_the_operators_own_result_as_an_output_fuses_nothing():
    proto = matmul_graph([node("Relu", "h", "y")], outputs=("h", "y"))
    assert fused(proto) == [""]
    agrees(proto)


@pytest.mark.parametrize("kind", ["Softmax", "CumSum"])
def test_what_is_not_elementwise_stays_outside(kind):
    last = node("Softmax", "h", "y") if kind == "Softmax" else node("CumSum", "h axis", "y")
    proto = matmul_graph([last], {} if kind == "Softmax" else {"axis": np.array(1)})
    assert fused(proto) == [""]


def test_a_result_that_grows_by_broadcasting_stays_outside():
    proto = matmul_graph([node("Add", "h r", "y")], inputs={"x": (5, 16), "r": (3, 5, 12)})
    assert fused(proto) == [""]
    agrees(proto)


def test_a_residual_that_is_broadcast_stays_outside():
    proto = matmul_graph([node("Add", "h r", "y")], inputs={"x": (5, 16), "r": (5, 1)})
    assert fused(proto) == [""]
    agrees(proto)


def test_a_vector_along_the_tokens_is_not_one_along_the_features():
    square = random(12, 1, seed=2)
    nodes = [node("Relu", "h", "r"), node("Mul", "r b", "y")]
    proto = matmul_graph(nodes, {"b": square}, {"x": (12, 16)})
    assert fused(proto) == ["maximum"]
    agrees(proto)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (6, 1, 1)])
@pytest.mark.parametrize(("kind", "name"), [("Mul", "multiply"), ("Add", "add")])
def test_a_scale_for_each_channel_of_a_convolution_is_fused(shape, kind, name):
    scale = np.abs(random(*shape, seed=4)) + 0.5
    proto = conv_graph([node("Relu", "h", "r"), node(kind, "r s", "y")], {"s": scale})
    assert fused(proto) == [f"maximum+{name}"]
    agrees(proto)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (6, 1), (1, 1, 6, 1)])
def test_a_vector_along_another_axis_of_a_convolution_stays_outside(shape):
    """The image is as wide and as high as there are channels, so that only the axis tells."""
    proto = conv_graph([node("Relu", "h", "r"), node("Mul", "r s", "y")], {"s": random(*shape)})
    assert fused(proto) == ["maximum"]
    agrees(proto)


def test_a_convolution_takes_bias_residual_and_activation():
    nodes = [
        node("Conv", "x w c", "h", name="conv", pads=[1, 1, 1, 1]),
        node("Add", "r h", "s"),
        node("Relu", "s", "y"),
    ]
    weights = {"w": random(6, 4, 3, 3) * 0.2, "c": random(6)}
    proto = onnx_model(nodes, weights, {"x": (2, 4, 7, 5), "r": (2, 6, 7, 5)})
    assert fused(proto) == ["add+add+maximum"]
    agrees(proto)


def test_a_reshape_that_keeps_the_features_is_fused_through():
    proto = matmul_graph(
        [node("Reshape", "h s", "a"), node("Add", "a b", "c"), node("Relu", "c", "y")],
        {"s": np.array([2, 3, 12]), "b": VECTOR},
        {"x": (6, 16)},
    )
    assert fused(proto) == ["add+maximum"]
    agrees(proto)


def test_a_reshape_that_splits_the_features_ends_the_chain():
    proto = matmul_graph(
        [
            node("Add", "h b", "a"),
            node("Reshape", "a s", "c"),
            node("Mul", "c v", "y"),
        ],
        {"b": VECTOR, "s": np.array([5, 3, 4]), "v": random(4, seed=6)},
    )
    assert fused(proto) == ["add"]
    agrees(proto)


def test_a_residual_between_reshapes_is_seen_in_the_kernels_shape():
    proto = matmul_graph(
        [node("Reshape", "h s", "a"), node("Add", "a r", "y")],
        {"s": np.array([2, 3, 12])},
        {"x": (6, 16), "r": (2, 3, 12)},
    )
    assert fused(proto) == ["add"]
    agrees(proto)


def test_two_uses_of_one_weight_are_two_sites_with_chains_of_their_own():
    proto = onnx_model(
        [
            node("MatMul", "x w", "h", name="first"),
            node("Relu", "h", "r"),
            node("MatMul", "r w", "g", name="second"),
            node("Sigmoid", "g", "y"),
        ],
        {"w": random(16, 16) * 0.2},
        {"x": (5, 16)},
    )
    assert fused(proto) == ["maximum", "sigmoid"]
    first, second = sites_of(proto)
    assert first.site.param == second.site.param
    assert first.site.name != second.site.name
    agrees(proto)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_symbolic_batch_fuses_bias_residual_and_activation(rank):
    leading = ("batch",) if rank == 2 else ("batch", "seq")
    proto = matmul_graph(
        [node("Add", "b h", "a"), node("Add", "a r", "s"), node("Relu", "s", "y")],
        {"b": VECTOR},
        {"x": (*leading, 16), "r": (*leading, 12)},
    )
    assert fused(proto) == ["add+add+maximum"]
    agrees(proto, {"batch": 3, "seq": 7})


def test_symbols_that_may_differ_are_not_taken_for_equal():
    proto = matmul_graph([node("Add", "h r", "y")], inputs={"x": ("batch", 16), "r": ("rows", 12)})
    assert fused(proto) == [""]
    with pytest.raises(ModelError, match="TVM cannot compile"):
        ts.compile(proto, "x86-64-v3", check=False)


@pytest.mark.parametrize("kind", ["matmul", "conv2d"])
def test_a_weight_behind_a_tensor_of_unknown_shape_is_refused_in_words(kind):
    shape = (5, 16) if kind == "matmul" else (1, 16, 6, 6)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    u = relax.Var("u", relax.TensorType(dtype="float32", ndim=len(shape)))
    weight = W if kind == "matmul" else random(8, 16, 3, 3)
    with builder.function("main", [x, u]):
        with builder.dataflow():
            s = builder.emit(relax.op.add(x, u))
            op = relax.op.matmul if kind == "matmul" else relax.op.nn.conv2d
            y = builder.emit_output(op(s, relax.const(weight)))
        builder.emit_func_output(y)
    (site,) = collect_weights(ts.load(builder.get()))
    assert site.site.refusal == "the shape of the activations is not known"


def test_one_feature_and_one_token_are_no_special_case():
    proto = onnx_model(
        [node("MatMul", "x w", "h"), node("Add", "h b", "a"), node("Relu", "a", "y")],
        {"w": random(16, 1), "b": random(1)},
        {"x": (1, 16)},
    )
    assert fused(proto) == ["add+maximum"]
    agrees(proto)


def test_a_vector_of_activations_is_one_token():
    proto = matmul_graph([node("Add", "h r", "y")], inputs={"x": (16,), "r": (12,)})
    assert fused(proto) == ["add"]
    agrees(proto)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_fused_in_half_precision_is_of_that_type(dtype):
    kind = numpy_dtype(dtype)
    element = helper.np_dtype_to_tensor_dtype(kind)
    nodes = [
        node("MatMul", "x w", "h", name="fc"),
        node("Add", "h b", "i"),
        node("Clip", "i low high", "j"),
        node("Add", "j r", "k"),
        node("Mul", "k two", "l"),
        node("Cast", "l", "m", to=element),
        node("Relu", "m", "y"),
    ]
    weights = {"w": W, "b": random(12), "low": np.array(-0.5), "high": np.array(0.5)}
    weights |= {"two": np.array([2.0])}
    rounded = {name: value.astype(kind) for name, value in weights.items()}
    proto = onnx_model(nodes, rounded, {"x": (5, 16), "r": (5, 12)}, dtype=element)
    [site] = sites_of(proto)
    assert site.site.workload.epilogue.describe() == "add+maximum+minimum+add+multiply+maximum"
    assert [str(tensor.ty.dtype) for tensor in site.fused.tensors] == [dtype]


def test_a_cast_to_another_type_ends_what_is_fused():
    nodes = [
        node("MatMul", "x w", "h", name="fc"),
        node("Relu", "h", "i"),
        node("Cast", "i", "j", to=TensorProto.FLOAT),
        node("Exp", "j", "k"),
        node("Cast", "k", "y", to=TensorProto.FLOAT16),
    ]
    half = W.astype(np.float16)
    proto = onnx_model(nodes, {"w": half}, {"x": (5, 16)}, dtype=TensorProto.FLOAT16)
    assert fused(proto) == ["maximum"]
