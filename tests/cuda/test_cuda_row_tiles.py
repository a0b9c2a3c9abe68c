"""Unstructured weights on CUDA cores agree with float64."""

from __future__ import annotations

from emulator import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import check_kernel
from layer_reference import EPILOGUES, weight_for

from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

pytestmark = needs_compiler

sizes = st.sampled_from([1, 3, 16, 33, 64, 100])


@settings(max_examples=6)
@given(
    m=sizes,
    k=sizes,
    n=sizes,
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    symbolic=st.booleans(),
    choice=st.integers(0, 99),
    seed=st.integers(0, 99),
)
def test_matmul_agrees_with_float64(m, k, n, density, epilogue, symbolic, choice, seed):
    geometry = MatmulGeometry(m, k, None if symbolic else n)
    workload = Workload("matmul", geometry, epilogue=EPILOGUES[epilogue])
    weight = weight_for(geometry, density, seed)
    check_kernel("cuda_row_tiles", workload, weight, choice, n, seed)


@settings(max_examples=6)
@given(
    geometry=st.builds(
        Conv2dGeometry,
        st.integers(1, 2),
        st.integers(1, 9),
        st.integers(5, 20),
        st.integers(5, 20),
        st.sampled_from([1, 8, 40]),
        st.sampled_from([(1, 1), (3, 3), (2, 3)]),
        st.sampled_from([(1, 1), (2, 2), (1, 2)]),
        st.tuples(*[st.integers(0, 2)] * 4),
        st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    ),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    choice=st.integers(0, 99),
    seed=st.integers(0, 99),
)
def test_convolution_agrees_with_float64(geometry, density, epilogue, choice, seed):
    workload = Workload("conv2d", geometry, epilogue=EPILOGUES[epilogue])
    weight = weight_for(geometry, density, seed)
    check_kernel("cuda_row_tiles", workload, weight, choice, geometry.batch, seed)
