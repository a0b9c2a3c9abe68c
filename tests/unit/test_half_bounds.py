"""What results in float16 and bfloat16 may differ from float64 by."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from layer_reference import EPILOGUES, operands, reference, weight_for

from tvm_sparse.check import compare, half_dot_bound, rounded_bound
from tvm_sparse.dtypes import FLOAT_TYPES, HALF_TYPES, numpy_dtype
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

HALVES = sorted(HALF_TYPES)
MATMUL = MatmulGeometry(24, 40, 7)
CONV = Conv2dGeometry(2, 4, 6, 5, 8, (3, 3), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("name", FLOAT_TYPES)
def test_the_limits_of_a_type_are_those_of_numpy(name):
    limits, ours = ml_dtypes.finfo(numpy_dtype(name)), FLOAT_TYPES[name]
    assert ours.roundoff == float(limits.eps) / 2
    assert ours.smallest == float(limits.smallest_subnormal)
    assert ours.smallest_normal == float(limits.smallest_normal)
    assert ours.largest == float(limits.max)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e3])
def test_a_rounded_number_is_within_its_bound(dtype, scale):
    values = scale * np.random.default_rng(0).standard_normal(1000)
    rounded = values.astype(np.float32).astype(numpy_dtype(dtype))
    bound = rounded_bound(values, 2.0**-24 * np.abs(values), dtype)
    assert compare("y", rounded, values, bound).ok


@pytest.mark.parametrize("dtype", HALVES)
def test_a_number_that_is_rounded_twice_as_coarsely_is_not(dtype):
    values = np.random.default_rng(0).standard_normal(1000)
    step = 4 * FLOAT_TYPES[dtype].roundoff
    bound = rounded_bound(values, np.zeros(()), dtype)
    assert not compare("y", np.round(values / step) * step, values, bound).ok


def test_float32_results_are_not_rounded_again():
    bound = np.array([1e-6])
    assert rounded_bound(np.ones(1), bound, "float32") is bound


def test_a_sum_beyond_the_largest_float16_may_be_infinite():
    want, bound = np.array([70000.0, -70000.0]), np.full(2, 1.0)
    assert compare("y", np.array([np.inf, -np.inf], np.float16), want, bound).ok
    assert not compare("y", np.array([-np.inf, -np.inf], np.float16), want, bound).ok
    assert not compare("y", np.array([np.inf, -np.inf], np.float32), want, bound).ok


@pytest.mark.parametrize("digits", [24, 25])
def test_sums_that_tensor_cores_cut_are_within_their_bound(digits):
    rng = np.random.default_rng(3)
    products = rng.standard_normal((50, 64)) * np.exp(rng.normal(0, 2, (50, 64)))
    products = products.astype(np.float16).astype(np.float64)
    for step in (1, 4, 8):
        sums = np.zeros(50)
        for first in range(0, 64, step):
            addends = np.column_stack([sums, products[:, first : first + step]])
            largest = np.abs(addends).max(1, keepdims=True)
            sums = _cut(_cut(addends, largest, digits).sum(1), None, 24)
        bound = half_dot_bound(np.abs(products).sum(1), 64)
        assert np.all(np.abs(sums - products.sum(1)) <= bound)


def _cut(values, largest, digits):
    """Drop what lies behind so many binary digits of the largest."""
    exponent = np.frexp(values if largest is None else largest)[1]
    unit = np.ldexp(1.0, exponent - digits)
    return np.trunc(values / unit) * unit


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("geometry", [MATMUL, CONV])
def test_a_layer_in_float32_rounded_once_is_within_the_reference(dtype, epilogue, geometry):
    op = "matmul" if geometry is MATMUL else "conv2d"
    workload = Workload(op, geometry, dtype, EPILOGUES[epilogue])
    weight = weight_for(geometry, 0.3, 1, dtype)
    x, channels, tensors, shape = operands(workload, 2, 1)
    everything = [weight, x, *channels, *tensors]
    assert {str(array.dtype) for array in everything} == {dtype}
    want, bound = reference(workload, weight, x, channels, tensors)
    assert want.shape == shape
    assert compare("y", want.astype(np.float32).astype(numpy_dtype(dtype)), want, bound).ok
    # A bound that a lost product goes through would be none.
    assert np.median(bound) < 4 * FLOAT_TYPES[dtype].roundoff * np.abs(want).mean()
