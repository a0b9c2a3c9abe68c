"""A format holds the types that it names, and float32 when it names none."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_sparse.dtypes import FLOAT_TYPES, HALF_TYPES, numpy_dtype
from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.base import check_matrix


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_a_matrix_is_held_in_the_types_that_are_named(dtype):
    weight = np.ones((2, 3), numpy_dtype(dtype))
    assert check_matrix(weight).ok == (dtype == "float32")
    match = check_matrix(weight, HALF_TYPES)
    assert match.ok == (dtype in HALF_TYPES)
    if not match:
        assert match.reason == "the weight is float32; the format holds bfloat16 and float16"


@pytest.mark.parametrize("dtype", sorted(HALF_TYPES))
def test_the_processor_s_formats_hold_float32_only(dtype):
    match = FORMATS["plain"].supports(np.ones((2, 3), numpy_dtype(dtype)), {})
    assert match.reason == f"the weight is {dtype}; the format holds float32"
