"""Depthwise convolution and pooling agree with direct sums, at every border."""

from __future__ import annotations

import numpy as np
import pytest
from dense_support import EPS, machine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.dense_kernel import UnsupportedShapeError
from tvm_sparse.schedules.x86.depthwise import depthwise_conv2d
from tvm_sparse.schedules.x86.direct_conv import direct_conv2d
from tvm_sparse.schedules.x86.pooling import Window, pool2d

from tvm_sparse.workload import Conv2dGeometry, Epilogue, EpilogueOp, EpilogueRef

LANES = pytest.mark.parametrize("lanes", [16, 8], ids="lanes{}".format)
WIDTHS = st.sampled_from([1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40])
BIAS_AND_RESIDUAL = Epilogue(
    (
        EpilogueOp("add", (EpilogueRef("acc"), EpilogueRef("channel", 0))),
        EpilogueOp("add", (EpilogueRef("node", 0), EpilogueRef("tensor", 0))),
        EpilogueOp("maximum", (EpilogueRef("node", 1), EpilogueRef("scalar", value=0.0))),
    ),
    channels=1,
    tensors=1,
)


def windows(x, window, fill):
    """Give every window of a padded image: [n, c, oh, ow, kh, kw]."""
    top, left, bottom, right = window.padding
    out = [window.out_size(axis, x.shape[2 + axis]) for axis in (0, 1)]
    # Rounding up may reach past the padding.
    spare = [window.strides[axis] for axis in (0, 1)]
    pads = ((0, 0), (0, 0), (top, bottom + spare[0]), (left, right + spare[1]))
    padded = np.pad(x.astype("float64"), pads, constant_values=fill)
    reach = [(window.kernel[i] - 1) * window.dilation[i] + 1 for i in (0, 1)]
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    view = view[:, :, :: window.strides[0], :: window.strides[1]]
    return view[:, :, : out[0], : out[1], :: window.dilation[0], :: window.dilation[1]]


def geometry_of(x, window, multiplier=1, batch=None):
    channels, height, width = x.shape[1:]
    return Conv2dGeometry(batch, channels, height, width, channels * multiplier, window.kernel,
                          window.strides, window.padding, window.dilation, channels)  # fmt: skip


def check_depthwise(lanes, x, window, multiplier=1, symbolic=False, epilogue=None):
    rng = np.random.default_rng(1)
    geometry = geometry_of(x, window, multiplier, None if symbolic else len(x))
    w = rng.standard_normal((geometry.out_channels, 1, *window.kernel)).astype("float32")
    view = np.repeat(windows(x, window, 0.0), multiplier, axis=1)
    want = np.einsum("ncijkl,ckl->ncij", view, w[:, 0])
    size = np.einsum("ncijkl,ckl->ncij", np.abs(view), np.abs(w[:, 0]))
    extra = []
    if epilogue is not None:
        bias = rng.standard_normal(geometry.out_channels).astype("float32")
        residual = rng.standard_normal(want.shape).astype("float32")
        extra = [bias, residual]
        size = size + np.abs(bias)[:, None, None] + np.abs(residual)
        want = np.maximum(want + bias[:, None, None] + residual, 0.0)
    func = depthwise_conv2d(geometry, machine(lanes), epilogue)
    got = run(func, lanes, [x, w, *extra], want.shape)
    taps = window.kernel[0] * window.kernel[1]
    assert np.all(np.abs(got - want) <= EPS * (taps + 3) * size)


def image(shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@LANES
@settings(max_examples=15, deadline=None)
@given(
    width=WIDTHS,
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    symbolic=st.booleans(),
)
def test_depthwise_agrees_with_float64(lanes, width, kernel, stride, dilation, padding, symbolic):
    window = Window((kernel, kernel), (stride, stride), padding, (dilation, dilation))
    x = image((2, 3, 9, width))
    if window.out_size(0, 9) >= 1 and window.out_size(1, width) >= 1:
        check_depthwise(lanes, x, window, symbolic=symbolic)


@LANES
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_fuses_bias_residual_and_activation(lanes, stride):
    window = Window((3, 3), (stride, stride), (1, 1, 1, 1))
    check_depthwise(lanes, image((2, 3, 7, 19)), window, epilogue=BIAS_AND_RESIDUAL)


@LANES
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_walks_rows_longer_than_the_registers_hold(lanes, stride):
    window = Window((3, 3), (1, stride), (1, 1, 1, 1))
    check_depthwise(lanes, image((1, 1, 2, 1201)), window)


def test_depthwise_takes_several_outputs_per_input_channel():
    check_depthwise(8, image((2, 3, 6, 11)), Window((3, 3), padding=(1, 1, 1, 1)), multiplier=2)


def test_depthwise_with_the_kernel_taller_than_the_image():
    check_depthwise(8, image((1, 2, 2, 3)), Window((5, 5), padding=(3, 3, 3, 3)))


@LANES
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("groups", "channels"), [(1, (3, 4)), (2, (6, 4)), (4, (8, 12))])
@pytest.mark.parametrize("symbolic", [False, True])
def test_grouped_convolution_agrees_with_float64(lanes, kernel, groups, channels, symbolic):
    window = Window((kernel, kernel), padding=(kernel // 2,) * 4)
    x = image((2, channels[0], 5, 9))
    depth = channels[0] // groups
    w = np.random.default_rng(1).standard_normal((channels[1], depth, kernel, kernel))
    w = w.astype("float32")
    geometry = Conv2dGeometry(None if symbolic else 2, channels[0], 5, 9, channels[1],
                              window.kernel, padding=window.padding, groups=groups)  # fmt: skip
    view = windows(x, window, 0.0).reshape(2, groups, depth, 5, 9, kernel, kernel)
    split = w.reshape(groups, -1, depth, kernel, kernel)
    want = np.einsum("ngcijkl,gockl->ngoij", view, split).reshape(2, channels[1], 5, 9)
    size = np.einsum("ngcijkl,gockl->ngoij", abs(view), abs(split)).reshape(want.shape)
    got = run(direct_conv2d(geometry, machine(lanes)), lanes, [x, w], want.shape)
    assert np.all(np.abs(got - want) <= EPS * (depth * kernel**2 + 3) * size)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(UnsupportedShapeError, match="do not divide"):
        direct_conv2d(Conv2dGeometry(1, 4, 8, 8, 4, (3, 3), groups=3), machine(8))


@pytest.mark.parametrize(
    ("window", "groups", "words"),
    [
        (Window((3, 3), (3, 3)), 4, "stride of 3"),
        (Window((3, 3)), 2, "not depthwise"),
        (Window((9, 9)), 4, "empty"),
    ],
)
def test_depthwise_refuses_with_the_reason(window, groups, words):
    geometry = Conv2dGeometry(1, 4, 8, 8, 4, window.kernel, window.strides, groups=groups)
    with pytest.raises(UnsupportedShapeError, match=words):
        depthwise_conv2d(geometry, machine(8))


@LANES
@settings(max_examples=15, deadline=None)
@given(
    width=WIDTHS,
    kernel=st.sampled_from([2, 3, 5]),
    stride=st.sampled_from([1, 2]),
    padding=st.integers(0, 1),
    ceil_mode=st.booleans(),
    dilation=st.sampled_from([1, 2]),
)
def test_max_pooling_is_exact(lanes, width, kernel, stride, padding, ceil_mode, dilation):
    window = Window((kernel, kernel), (stride, stride), (padding,) * 4, (dilation,) * 2, ceil_mode)
    x = image((1, 2, 11, width))
    if window.out_size(1, width) < 1:
        return
    want = windows(x, window, -np.inf).max((4, 5))
    got = run(pool2d("n", 2, 11, width, window, machine(lanes)), lanes, [x], want.shape)
    np.testing.assert_array_equal(got, want.astype("float32"))


@LANES
@settings(max_examples=15, deadline=None)
@given(
    width=WIDTHS,
    kernel=st.sampled_from([2, 3, 5]),
    stride=st.sampled_from([1, 2]),
    padding=st.integers(0, 1),
    include=st.booleans(),
)
def test_average_pooling_agrees_with_float64(lanes, width, kernel, stride, padding, include):
    window = Window((kernel, kernel), (stride, stride), (padding,) * 4)
    x = image((1, 2, 11, width))
    if window.out_size(1, width) < 1:
        return
    valid = kernel**2 if include else windows(np.ones_like(x), window, 0.0).sum((4, 5))
    want = windows(x, window, 0.0).sum((4, 5)) / valid
    size = windows(np.abs(x), window, 0.0).sum((4, 5)) / valid
    func = pool2d(1, 2, 11, width, window, machine(lanes), "avg", include)
    got = run(func, lanes, [x], want.shape)
    assert np.all(np.abs(got - want) <= EPS * (kernel**2 + 2) * size)


@LANES
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pooling_keeps_nan_in_every_window_that_holds_it(lanes, kind):
    x = image((1, 1, 9, 21))
    x[0, 0, 4, 10] = np.nan
    window = Window((3, 3), padding=(1, 1, 1, 1))
    got = run(pool2d(1, 1, 9, 21, window, machine(lanes), kind), lanes, [x], x.shape)
    want = np.zeros((9, 21), bool)
    want[3:6, 9:12] = True
    np.testing.assert_array_equal(np.isnan(got[0, 0]), want)


def test_averages_whose_meaning_frameworks_dispute_are_refused():
    window = Window((3, 3), (2, 2), ceil_mode=True)
    with pytest.raises(UnsupportedShapeError, match="ceil_mode"):
        pool2d(1, 2, 8, 8, window, machine(8), "avg", count_include_pad=True)
