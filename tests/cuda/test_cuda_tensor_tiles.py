"""Kernels for tensor cores agree with float64."""

from __future__ import annotations

import dataclasses

from emulator import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import check_kernel
from layer_reference import EPILOGUES, weight_for

from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

pytestmark = needs_compiler

TEMPLATES = ["cuda_tile_wise", "cuda_two_four", "cuda_tile_wise_two_four"]

templates = st.sampled_from(TEMPLATES)
dtypes = st.sampled_from(["float16", "bfloat16", "float32"])
copies = st.sampled_from(["late", "early"])
densities = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@settings(max_examples=12)
@given(
    template=templates,
    dtype=dtypes,
    m=st.sampled_from([1, 16, 50, 96]),
    k=st.sampled_from([1, 24, 64, 100]),
    n=st.sampled_from([1, 8, 33, 64]),
    layout=st.sampled_from(["rows", "features"]),
    density=densities,
    epilogue=st.sampled_from(list(EPILOGUES)),
    symbolic=st.booleans(),
    choice=st.integers(0, 99),
    copies=copies,
    seed=st.integers(0, 99),
)
def test_matmul_agrees_with_float64(
    template, dtype, m, k, n, layout, density, epilogue, symbolic, choice, copies, seed
):
    geometry = MatmulGeometry(m, k, None if symbolic else n, layout)
    workload = Workload("matmul", geometry, dtype, EPILOGUES[epilogue])
    weight = weight_for(geometry, density, seed, dtype)
    check_kernel(template, workload, weight, choice, n, seed, copies)


@settings(max_examples=8)
@given(
    template=templates,
    dtype=dtypes,
    geometry=st.builds(
        Conv2dGeometry,
        st.integers(1, 2),
        st.integers(1, 9),
        st.integers(5, 12),
        st.integers(5, 12),
        st.sampled_from([1, 8, 40]),
        st.sampled_from([(1, 1), (3, 3), (2, 3)]),
        st.sampled_from([(1, 1), (2, 2), (1, 2)]),
        st.tuples(*[st.integers(0, 2)] * 4),
        st.sampled_from([(1, 1), (2, 2), (1, 2)]),
    ),
    density=densities,
    epilogue=st.sampled_from(list(EPILOGUES)),
    symbolic=st.booleans(),
    choice=st.integers(0, 99),
    copies=copies,
    seed=st.integers(0, 99),
)
def test_convolution_agrees_with_float64(
    template, dtype, geometry, density, epilogue, symbolic, choice, copies, seed
):
    batch = geometry.batch
    geometry = dataclasses.replace(geometry, batch=None if symbolic else batch)
    workload = Workload("conv2d", geometry, dtype, EPILOGUES[epilogue])
    weight = weight_for(geometry, density, seed, dtype)
    check_kernel(template, workload, weight, choice, batch, seed, copies)


def test_float32_keeps_more_digits_than_tensor_cores_have():
    geometry = MatmulGeometry(64, 4, 64)
    weight = weight_for(geometry, 1.0, 0)
    workload = Workload("matmul", geometry)
    # Factors of 11 digits are off by up to 2**-12 of them each: a hundred times this bound.
    check_kernel("cuda_two_four", workload, weight, 0, 64)
