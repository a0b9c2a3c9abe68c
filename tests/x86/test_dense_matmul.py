"""Products of two activations agree with float64 for any shape, batched and broadcast."""

from __future__ import annotations

import numpy as np
import pytest
from dense_support import EPS, machine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.batch_matmul import batch_matmul
from tvm_sparse.schedules.x86.dense_kernel import UnsupportedShapeError

LANES = pytest.mark.parametrize("lanes", [16, 8], ids="lanes{}".format)
SIZES = st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13, 15, 16, 17, 31, 33, 63, 64, 65, 130])


def check(lanes, a_shape, b_shape, a_dims=None, b_dims=None, scale=1.0):
    rng = np.random.default_rng(0)
    a = rng.standard_normal(a_shape).astype("float32")
    b = rng.standard_normal(b_shape).astype("float32")
    want = scale * (a.astype("float64") @ b)
    func = batch_matmul(a_dims or a_shape, b_dims or b_shape, machine(lanes), scale)
    got = run(func, lanes, [a, b], want.shape)
    bound = EPS * (a_shape[-1] + 2) * scale * (np.abs(a).astype("float64") @ np.abs(b))
    assert np.all(np.abs(got - want) <= bound)


@LANES
@settings(max_examples=12, deadline=None)
@given(m=SIZES, k=SIZES, n=SIZES, symbolic=st.booleans())
def test_any_size_agrees_with_float64(lanes, m, k, n, symbolic):
    dims = (("b", "m", "k"), ("b", "k", "n")) if symbolic else (None, None)
    check(lanes, (2, m, k), (2, k, n), *dims)


@LANES
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((7, 9), (9, 20)),
        ((2, 3, 4, 5), (5, 6)),
        ((4, 5), (2, 3, 5, 6)),
        ((2, 1, 4, 5), (1, 3, 5, 6)),
        ((1, 1, 4, 5), (2, 3, 5, 6)),
    ],
)
def test_leading_dimensions_broadcast_as_in_numpy(lanes, a_shape, b_shape):
    check(lanes, a_shape, b_shape)


@LANES
def test_broadcasting_works_with_symbolic_batches(lanes):
    check(lanes, (3, 1, 4, 5), (1, 2, 5, 6), ("b", 1, "m", 5), (1, "h", 5, 6))


def test_the_scale_is_applied_to_the_result():
    check(8, (2, 6, 8), (2, 8, 9), scale=0.125)


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "words"),
    [
        ((4,), (4, 5), "vector"),
        ((3, 4), (5, 6), "do not meet"),
        ((2, 3, 4), (3, 4, 5), "may differ"),
        (("b", 3, 4), ("c", 4, 5), "may differ"),
        ((0, 4), (4, 5), "empty"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_reason(a_shape, b_shape, words):
    with pytest.raises(UnsupportedShapeError, match=words):
        batch_matmul(a_shape, b_shape, machine(8))
