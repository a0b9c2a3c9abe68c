"""Softmax, normalisation and reductions over rows agree with float64, for any row length."""

from __future__ import annotations

import numpy as np
import pytest
from dense_support import EPS, machine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.dense_kernel import UnsupportedShapeError
from tvm_sparse.schedules.x86.layer_norm import layer_norm
from tvm_sparse.schedules.x86.reduce import reduce_last
from tvm_sparse.schedules.x86.softmax import softmax

LANES = pytest.mark.parametrize("lanes", [16, 8], ids="lanes{}".format)
LENGTHS = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 257, 300, 769])


def normal(shape, seed=0, scale=1.0, shift=0.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale + shift
    return values.astype("float32")


def exact_softmax(x, scale):
    shifted = scale * (x.astype("float64") - x.max(-1, keepdims=True))
    e = np.exp(shifted)
    return e / e.sum(-1, keepdims=True)


@LANES
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 5),
    length=LENGTHS,
    symbolic=st.booleans(),
    scale=st.sampled_from([1.0, 0.125]),
)
def test_softmax_agrees_with_float64(lanes, rows, length, symbolic, scale):
    x = normal((rows, length), scale=6.0)
    shape = ("rows", "length") if symbolic else x.shape
    got = run(softmax(shape, machine(lanes), "softmax", scale), lanes, [x], x.shape)
    want = exact_softmax(x, scale)
    # The difference x - max is rounded: its error grows with its size.
    reach = scale * (x.max(-1, keepdims=True) - x)
    assert np.all(np.abs(got - want) <= want * EPS * (8 + reach + length / lanes) + 2e-38)


@LANES
@pytest.mark.parametrize("length", [1, 17, 64, 300])
def test_log_softmax_agrees_with_float64(lanes, length):
    x = normal((3, length), scale=6.0)
    got = run(softmax(x.shape, machine(lanes), "log_softmax"), lanes, [x], x.shape)
    want = np.log(exact_softmax(x, 1.0))
    assert np.all(np.abs(got - want) <= EPS * (8 + 2 * np.abs(want) + length / lanes))


@LANES
def test_softmax_of_infinite_and_missing_values_is_that_of_numpy(lanes):
    x = np.zeros((5, 19), "float32")
    x[0, 3], x[1, 18], x[2, 0], x[3] = np.nan, np.inf, -np.inf, -np.inf
    got = run(softmax(x.shape, machine(lanes)), lanes, [x], x.shape)
    assert np.isnan(got[[0, 1, 3]]).all()
    assert got[2, 0] == 0.0
    np.testing.assert_allclose(got[2, 1:], 1 / 18, rtol=1e-6)
    np.testing.assert_allclose(got[4], 1 / 19, rtol=1e-6)


def test_softmax_on_threads_gives_the_same():
    x = normal((64, 700), scale=4.0)
    one = run(softmax(x.shape, machine(8, threads=1)), 8, [x], x.shape)
    two = run(softmax(x.shape, machine(8, threads=2)), 8, [x], x.shape)
    np.testing.assert_array_equal(one, two)


@LANES
@settings(max_examples=8, deadline=None)
@given(
    length=LENGTHS,
    kind=st.sampled_from(["layer_norm", "rms_norm"]),
    gamma=st.booleans(),
    beta=st.booleans(),
    shift=st.sampled_from([0.0, 100.0]),
)
def test_normalisation_agrees_with_float64(lanes, length, kind, gamma, beta, shift):
    x = normal((3, length), shift=shift)
    scale, summand = normal(length, 1), normal(length, 2)
    func = layer_norm(("n", length), 1, machine(lanes), 1e-3, kind, gamma, beta)
    inputs = [x, *([scale] if gamma else []), *([summand] if beta else [])]
    got = run(func, lanes, inputs, x.shape)
    wide = x.astype("float64")
    if kind == "layer_norm":
        wide = wide - wide.mean(-1, keepdims=True)
    root = np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
    factor = scale if gamma else 1.0
    want = wide / root * factor + (summand if beta else 0.0)
    # Rounding of the mean and of the difference is relative to the values, not to the spread.
    steps = 8 + length / lanes
    bound = EPS * steps * (np.abs(x).max(-1, keepdims=True) / root + np.abs(wide / root))
    assert np.all(np.abs(got - want) <= bound * np.abs(factor) + EPS * (1 + np.abs(want)))


@LANES
def test_layer_norm_over_two_axes_is_that_of_their_product(lanes):
    x, gamma, beta = normal((2, 3, 5, 7)), normal((5, 7), 1), normal((5, 7), 2)
    got = run(layer_norm(x.shape, 2, machine(lanes)), lanes, [x, gamma, beta], x.shape)
    mean, variance = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
    want = (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_layer_norm_needs_axes_of_known_size():
    with pytest.raises(UnsupportedShapeError, match="known size"):
        layer_norm((3, "n"), 1, machine(8))


@LANES
@settings(max_examples=8, deadline=None)
@given(
    length=LENGTHS,
    kind=st.sampled_from(["sum", "mean", "max", "min"]),
    symbolic=st.booleans(),
)
def test_reductions_agree_with_float64(lanes, length, kind, symbolic):
    x = normal((4, length))
    shape = ("rows", "length") if symbolic else x.shape
    got = run(reduce_last(shape, 1, shape[:1], machine(lanes), kind), lanes, [x], (4,))
    want = getattr(np, kind)(x.astype("float64"), axis=1)
    size = np.abs(x).sum(1) if kind == "sum" else np.abs(x).mean(1) + np.abs(want)
    assert np.all(np.abs(got - want) <= EPS * (8 + length / lanes) * size)


@LANES
@pytest.mark.parametrize("kind", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("place", [0, 20, 36])
def test_reductions_keep_nan_wherever_it_stands(lanes, kind, place):
    x = normal((2, 37))
    x[0, place] = np.nan
    got = run(reduce_last(x.shape, 1, (2, 1), machine(lanes), kind), lanes, [x], (2, 1))
    assert np.isnan(got[0, 0])
    assert np.isfinite(got[1, 0])
