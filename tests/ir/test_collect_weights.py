"""Every weight of a matmul or convolution is found, named, measured, or refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from load_support import onnx_model, random
from onnx import TensorProto, helper
from tvm import relax
from tvm_sparse.passes.collect_weights import collect_weights

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.errors import CheckError
from tvm_sparse.ops import WeightSite
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry


def sites_of(source: Any) -> list[WeightSite]:
    return [fused.site for fused in collect_weights(ts.load(source))]


def one(
    kind: str, x: tuple[Any, ...], w: np.ndarray, dtype: int = TensorProto.FLOAT, **attributes: Any
) -> WeightSite:
    """The single site of a graph of one node."""
    node = helper.make_node(kind, ["x", "w"], ["y"], name="layer", **attributes)
    (site,) = sites_of(onnx_model([node], {"w": w}, {"x": x}, dtype=dtype))
    return site


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((5, 16), 5),
        ((2, 3, 16), 6),
        ((2, 3, 4, 16), 24),
        ((16,), 1),
        (("n", 16), None),
        ((2, "n", 16), None),
    ],
)
def test_leading_dimensions_of_a_matmul_are_tokens(shape, tokens):
    site = one("MatMul", shape, random(16, 12))
    assert site.workload.op == "matmul"
    assert site.workload.geometry == MatmulGeometry(m=12, k=16, n=tokens)
    assert site.refusal == ""


def test_a_convolution_is_read_with_all_its_attributes():
    site = one(
        "Conv",
        (2, 6, 15, 13),
        random(8, 3, 3, 2),
        strides=[2, 1],
        pads=[1, 0, 2, 1],
        dilations=[1, 2],
        group=2,
    )
    assert site.workload.geometry == Conv2dGeometry(
        2, 6, 15, 13, 8, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2
    )
    assert site.weight_shape == (8, 3, 3, 2)


def test_a_symbolic_batch_of_images_is_kept_symbolic():
    site = one("Conv", ("n", 3, 9, 9), random(4, 3, 3, 3))
    assert site.workload.geometry.batch is None


REFUSED = {
    "a symbolic image": (
        ("Conv", (1, 3, "h", "w"), random(4, 3, 3, 3)),
        {},
        "the image size is symbolic; fix it with a shape",
    ),
    "a weight of three dimensions": (
        ("MatMul", (2, 5, 16), random(2, 16, 12)),
        {},
        "the weight has 3 dimensions; only matrices are packed",
    ),
    "float64": (
        ("MatMul", (5, 16), random(16, 12).astype(np.float64)),
        {"dtype": TensorProto.DOUBLE},
        "the weight is float64; kernels exist for float32, float16 and bfloat16 only",
    ),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_found_with_its_geometry_and_epilogue(dtype):
    [matmul] = collect_weights(ts.load(zoo.single_matmul(12, 16, 5, bias=True, dtype=dtype)))
    assert matmul.site.workload.dtype == dtype
    assert matmul.site.workload.geometry == MatmulGeometry(12, 16, 5)
    assert matmul.site.workload.epilogue.describe() == "add"
    [conv] = collect_weights(ts.load(zoo.single_conv(4, 8, 6, dtype=dtype)))
    assert conv.site.workload.dtype == dtype
    assert conv.site.workload.epilogue.describe() == "add+maximum"
    assert (matmul.site.refusal, conv.site.refusal) == ("", "")


@pytest.mark.parametrize(
    ("x", "w", "y", "words"),
    [
        ("float32", "float16", "float32", "the activations are float32, and the weight is float16"),
        ("float16", "float32", "float32", "the activations are float16, and the weight is float32"),
        ("float16", "float16", "float32", "the result is float32, and the weight is float16"),
    ],
)
def test_types_that_are_mixed_are_refused_in_words(x, w, y, words):
    data = relax.Var("x", relax.TensorType((5, 16), x))
    weight = relax.Var("w", relax.TensorType((16, 12), w))
    builder = relax.BlockBuilder()
    with builder.function("main", [data, weight], attrs={"num_input": 1}):
        with builder.dataflow():
            result = builder.emit_output(relax.op.matmul(data, weight, y))
        builder.emit_func_output(result)
    model = ts.load(builder.get(), params={"w": random(16, 12).astype(w)})
    [fused] = collect_weights(model)
    assert fused.site.refusal == words
    assert fused.site.workload.geometry is None


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_kernel_takes_is_found_and_refused_in_words(what):
    arguments, options, words = REFUSED[what]
    site = one(*arguments, **options)
    assert site.refusal == words
    assert site.workload.geometry is None


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_reaches_the_report_the_plan_and_a_module_that_works(what):
    (kind, shape, weight), options, words = REFUSED[what]
    node = helper.make_node(kind, ["x", "w"], ["y"], name="layer")
    dtype = options.get("dtype", TensorProto.FLOAT)
    proto = onnx_model([node], {"w": weight}, {"x": shape}, dtype=dtype)
    assert ts.inspect(proto).layers[0].reason == words
    decision = ts.plan(proto, "x86-64-v3", threads=1).decisions[0]
    assert (decision.kernel, decision.reason) == ("tvm", words)
    module = ts.compile(proto, "x86-64-v3", threads=1)
    assert module.report.layers[0].reason == words


def test_a_model_that_random_inputs_do_not_fit_says_what_to_do():
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="layer")
    proto = onnx_model([node], {"w": random(4, 3, 70, 3)}, {"x": (1, 3, "h", "w")})
    with pytest.raises(CheckError, match="fix symbolic dimensions by shapes, or leave the check"):
        ts.compile(proto, "x86-64-v3", threads=1)
    ts.compile(proto, "x86-64-v3", threads=1, check=False)


def test_a_symbolic_image_is_compiled_once_a_shape_fixes_it():
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="layer")
    proto = onnx_model([node], {"w": random(4, 3, 3, 3)}, {"x": (1, 3, "h", "w")})
    (decision,) = ts.plan(proto, "x86-64-v3", threads=1, shapes={"x": (1, 3, 9, 9)}).decisions
    assert decision.kernel != "tvm"


def test_products_of_activations_and_elementwise_weights_are_no_sites():
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Mul", ["s", "w"], ["y"]),
    ]
    assert sites_of(onnx_model(nodes, {"w": random(5, 5)}, {"x": (5, 16)})) == []


def test_sites_carry_the_users_names_and_equal_names_are_told_apart():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="encoder/fc"),
        helper.make_node("MatMul", ["h", "w"], ["g"], name="encoder/fc"),
        helper.make_node("MatMul", ["g", "v"], ["y"], name="head"),
    ]
    weights = {"w": random(16, 16), "v": random(16, 4)}
    sites = sites_of(onnx_model(nodes, weights, {"x": (5, 16)}))
    names = [site.name for site in sites]
    assert len(set(names)) == 3
    assert names[0].startswith("encoder/fc")
    assert names[1] == f"{names[0]}#2"
    assert names[2] == "head"


def test_another_layout_is_refused_with_its_name():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 9, 9, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(random(3, 3, 3, 4))
            call = relax.op.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="HWIO")
            y = builder.emit_output(call)
        builder.emit_func_output(y)
    (site,) = sites_of(builder.get())
    assert "layout NHWC/HWIO/NHWC; only NCHW/OIHW is compiled" in site.refusal


def test_no_binding_belongs_to_two_kernels():
    nodes = []
    for index in range(4):
        nodes.append(helper.make_node("MatMul", ["x", f"w{index}"], [f"h{index}"]))
    nodes.append(helper.make_node("Add", ["h0", "h1"], ["a"]))
    nodes.append(helper.make_node("Mul", ["h2", "h3"], ["b"]))
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    weights = {f"w{index}": random(16, 12, seed=index) for index in range(4)}
    found = collect_weights(ts.load(onnx_model(nodes, weights, {"x": (5, 16)})))
    members = [member for site in found for member in site.fused.members]
    assert len(members) == len(set(members)) == 7
    assert sum(len(site.site.workload.epilogue.ops) for site in found) == 3


@pytest.mark.parametrize(
    ("op", "shape", "kernel", "words"),
    [
        ("Conv", [1, 4, 20], [6, 4, 3], "one-dimensional"),
        ("Conv", [1, 4, 6, 6, 6], [6, 4, 3, 3, 3], "three-dimensional"),
        ("ConvTranspose", [1, 4, 9, 9], [4, 6, 3, 3], "transposed"),
    ],
)
def test_operators_without_a_kernel_are_listed_with_the_reason(
    op: str, shape: list[int], kernel: list[int], words: str
) -> None:
    site = one(op, tuple(shape), np.ones(kernel, "float32"))
    assert words in site.refusal


def test_a_weight_on_the_left_is_listed_with_the_reason() -> None:
    node = helper.make_node("MatMul", ["w", "x"], ["y"], name="layer")
    weight = np.ones((3, 4), "float32")
    (site,) = sites_of(onnx_model([node], {"w": weight}, {"x": (4, 5)}))
    assert "left" in site.refusal
