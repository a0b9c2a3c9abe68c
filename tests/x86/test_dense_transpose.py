"""Permutations of axes move every element to its place."""

from __future__ import annotations

import numpy as np
import pytest
from dense_support import machine, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm_sparse.schedules.x86.dense_kernel import UnsupportedShapeError
from tvm_sparse.schedules.x86.transpose import permute_dims

LANES = pytest.mark.parametrize("lanes", [16, 8, 4], ids="lanes{}".format)
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19])


@LANES
@settings(max_examples=20, deadline=None)
@given(data=st.data(), rank=st.integers(1, 4), symbolic=st.booleans())
def test_every_element_finds_its_place(lanes, data, rank, symbolic):
    shape = tuple(data.draw(SIZES) for _ in range(rank))
    axes = tuple(data.draw(st.permutations(range(rank))))
    x = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    dims = [f"d{i}" if symbolic and i % 2 == 0 else size for i, size in enumerate(shape)]
    func = permute_dims(dims, axes, [dims[axis] for axis in axes], machine(lanes))
    want = np.transpose(x, axes)
    np.testing.assert_array_equal(run(func, lanes, [x], want.shape), want)


def test_bits_are_moved_untouched():
    x = np.array([[np.nan, -0.0], [np.inf, 1e-45]] * 8, "float32")
    got = run(permute_dims(x.shape, (1, 0), (2, 16), machine(8)), 8, [x], (2, 16))
    np.testing.assert_array_equal(got.view("int32"), x.T.copy().view("int32"))


def test_what_is_no_permutation_is_refused():
    with pytest.raises(UnsupportedShapeError, match="no permutation"):
        permute_dims((2, 3), (0, 0), (2, 2), machine(8))
