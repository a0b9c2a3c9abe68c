"""Upsampling by nearest neighbours repeats every pixel, whatever rounds the coordinates."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from dense_support import machine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tvm_sparse.schedules.x86.dense_kernel import UnsupportedShapeError
from tvm_sparse.schedules.x86.upsample import upsample_nearest

import tvm_sparse as ts

LANES = pytest.mark.parametrize("lanes", [16, 8, 4], ids="lanes{}".format)
FACTORS = st.integers(1, 4)


@LANES
@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 5),
    width=st.integers(4, 40),
    factors=st.tuples(FACTORS, FACTORS),
    batch=st.sampled_from([2, "n"]),
)
def test_every_pixel_is_repeated(lanes, height, width, factors, batch):
    x = np.arange(2 * 3 * height * width, dtype="float32").reshape(2, 3, height, width)
    func = upsample_nearest(batch, 3, height, width, factors, machine(lanes))
    want = x.repeat(factors[0], 2).repeat(factors[1], 3)
    np.testing.assert_array_equal(run(func, lanes, [x], want.shape), want)


def test_narrow_images_are_left_to_tvm():
    with pytest.raises(UnsupportedShapeError, match="rows of 3 pixels"):
        upsample_nearest(1, 1, 3, 3, (2, 2), machine(8))


def resize(scales: list[float], **attributes: str) -> onnx.ModelProto:
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], mode="nearest", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3, 6, 18))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1, 1, *scales], np.float32), "s")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("coordinates", "rounding"),
    [
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
        ("half_pixel", "floor"),
        ("asymmetric", "floor"),
        ("asymmetric", "round_prefer_floor"),
        ("asymmetric", "ceil"),
        ("align_corners", "round_prefer_floor"),
        ("tf_half_pixel_for_nn", "floor"),
    ],
)
@pytest.mark.parametrize("scales", [[2, 2], [3, 3], [1, 4], [1.5, 2]])
def test_whatever_rounds_the_coordinates(coordinates, rounding, scales):
    attributes = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    opset = 11 if coordinates == "tf_half_pixel_for_nn" else 17
    model = resize(scales, **attributes)
    model.opset_import[0].version = opset
    if opset == 11:
        model.graph.node[0].input[1] = "roi"
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(0, np.float32), "roi"))
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 18)).astype(np.float32)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_array_equal(ts.compile(model, threads=1, check=False)(x), want)
