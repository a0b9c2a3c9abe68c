"""Geometries tell sizes as ONNX and TVM compute them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.float64 import ConvAttributes, conv2d64
from tvm_sparse.workload import (
    Conv2dGeometry,
    Epilogue,
    EpilogueOp,
    EpilogueRef,
    MatmulGeometry,
    Workload,
)


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(5, 20), st.integers(5, 20)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_the_output_of_a_convolution_has_the_size_that_it_says(
    size, kernel, strides, padding, dilation
):
    geometry = Conv2dGeometry(1, 1, *size, 1, kernel, strides, padding, dilation)
    x, w = np.ones((1, 1, *size)), np.ones((1, 1, *kernel))
    y = conv2d64(x, w, ConvAttributes(strides, padding, dilation, 1))
    assert y.shape[2:] == (geometry.out_height, geometry.out_width)
    assert geometry.pixels == y.size


def test_a_weight_is_seen_as_outputs_by_inputs():
    assert MatmulGeometry(m=5, k=7, n=3).weight_shape == (5, 7)
    assert Conv2dGeometry(1, 8, 9, 9, 6, (3, 2)).weight_shape == (6, 48)
    assert Conv2dGeometry(1, 8, 9, 9, 6, (3, 2), groups=2).weight_shape == (6, 24)


def test_macs_count_tokens_and_pixels_and_take_a_guess_for_symbolic_ones():
    assert MatmulGeometry(5, 7, 3).macs() == 105
    assert MatmulGeometry(5, 7, None).macs(10) == 350
    assert MatmulGeometry(5, 7, 3).macs(10) == 105
    assert Conv2dGeometry(2, 4, 5, 5, 6, (3, 3)).macs() == 2 * 6 * 36 * 9
    assert Conv2dGeometry(None, 4, 5, 5, 6, (3, 3)).macs(3) == 3 * 6 * 36 * 9


@pytest.mark.parametrize(
    ("channels", "groups", "depthwise"), [(8, 8, True), (8, 4, False), (8, 1, False), (1, 1, False)]
)
def test_depthwise_is_one_input_channel_a_group(channels, groups, depthwise):
    geometry = Conv2dGeometry(1, channels, 9, 9, 8, (3, 3), groups=groups)
    assert geometry.is_depthwise is depthwise


def test_workloads_that_differ_anywhere_are_different_keys():
    acc = EpilogueRef("acc")
    base = Workload("matmul", MatmulGeometry(5, 7, 3))
    relu = Epilogue((EpilogueOp("maximum", (acc, EpilogueRef("scalar", value=0.0))),))
    clip = Epilogue((EpilogueOp("maximum", (acc, EpilogueRef("scalar", value=-1.0))),))
    others = [
        Workload("matmul", MatmulGeometry(5, 7, None)),
        Workload("matmul", MatmulGeometry(7, 5, 3)),
        Workload("matmul", MatmulGeometry(5, 7, 3), dtype="float16"),
        Workload("matmul", MatmulGeometry(5, 7, 3), epilogue=relu),
        Workload("matmul", MatmulGeometry(5, 7, 3), epilogue=clip),
        Workload("matmul", MatmulGeometry(5, 7, 3), threads=2),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert hash(base) == hash(Workload("matmul", MatmulGeometry(5, 7, 3)))


def test_an_epilogue_is_described_by_its_operations():
    acc = EpilogueRef("acc")
    ops = (EpilogueOp("add", (acc, acc)), EpilogueOp("gelu", (EpilogueRef("node", 0),)))
    assert Epilogue(ops).describe() == "add+gelu"
    assert Epilogue().describe() == ""
