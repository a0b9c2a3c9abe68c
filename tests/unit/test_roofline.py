"""What a layer's kernel does, the machine's limits, and what takes a kernel the longest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tvm_sparse.schedules.base import KernelTemplate
from tvm_sparse.schedules.lookup import ALL_TEMPLATES, templates_for
from tvm_sparse.schedules.roofline import Work, bound_by, ceilings, work
from tvm_sparse.schedules.x86.cost import KINDS, PRICE_NAMES
from tvm_sparse.schedules.x86.metaschedule import METASCHEDULE

from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import X86Machine, machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

AVX512 = X86Machine(mcpu="znver5", lanes=16, registers=32, gigahertz=4.0)
MATMUL = Workload("matmul", MatmulGeometry(m=64, k=32, n=128))


def test_a_processor_multiplies_by_vectors_and_reads_memory_by_lines() -> None:
    found = ceilings(AVX512)
    # 16 lanes, two multiply-adds a cycle, two operations each; 64 bytes in 15 cycles.
    assert found.gflops == pytest.approx(256)
    assert found.memory_gbytes == pytest.approx(64 * 4 / 15)
    assert found.tensor_gflops is None


def test_threads_and_a_calibration_raise_the_ceilings() -> None:
    machine = X86Machine("znver5", 16, 32, threads=4, gigahertz=4, prices=(("memory_line", 8.0),))
    found = ceilings(machine)
    assert found.gflops == pytest.approx(4 * 256)
    assert found.memory_gbytes == pytest.approx(4 * 32)


def test_a_gpu_has_cores_and_tensor_cores() -> None:
    found = ceilings(machine_of(resolve_target("cuda-sm80")))
    # What NVIDIA says of an A100: 19.5 and 312 TFLOP/s, 1555 GB/s.
    assert found.gflops == pytest.approx(19_500, rel=0.01)
    assert found.tensor_gflops == pytest.approx(312_000, rel=0.01)
    assert found.memory_gbytes == 1555


def test_the_work_of_a_matmul() -> None:
    found = work(MATMUL, AVX512, nnz=100, weight_bytes=600)
    assert found == Work(2 * 100 * 128, 600 + 4 * 128 * (32 + 64))


def test_the_work_of_a_convolution_counts_each_image_once() -> None:
    geometry = Conv2dGeometry(2, 3, 8, 8, 5, (3, 3), padding=(1, 1, 1, 1))
    found = work(Workload("conv2d", geometry), AVX512, nnz=10, weight_bytes=0)
    assert found == Work(2 * 10 * 2 * 64, 4 * 2 * (3 * 64 + 5 * 64))


def test_half_precision_halves_the_bytes_and_symbolic_sizes_are_assumed() -> None:
    workload = Workload("matmul", MatmulGeometry(m=64, k=32, n=None), dtype="float16")
    assert work(workload, AVX512, 1, 0) == Work(2 * 128, 2 * 128 * 96)
    assert work(Workload("matmul", None), AVX512, 1, 0) is None


def test_every_price_is_of_one_kind() -> None:
    assert sorted(name for names in KINDS.values() for name in names) == sorted(PRICE_NAMES)


@pytest.mark.parametrize("template", ALL_TEMPLATES, ids=lambda template: template.name)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_binds_is_known_of_every_kernel_that_is_estimated(
    template: KernelTemplate, dtype: str
) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(dtype)
    weight *= np.tile([1, 0, 1, 0], 16).astype(dtype)
    target = (
        "cuda-sm80"
        if template in templates_for(machine_of(resolve_target("cuda-sm80")))
        else "x86-64-v3"
    )
    machine = machine_of(resolve_target(target), 1)
    found = 0
    for workload in (
        Workload("matmul", MatmulGeometry(64, 64, 1), dtype),
        Workload("matmul", MatmulGeometry(64, 64, 128), dtype),
        Workload("conv2d", Conv2dGeometry(1, 64, 8, 8, 64, (1, 1)), dtype),
        Workload(
            "conv2d", Conv2dGeometry(1, 64, 8, 8, 64, (3, 3), padding=(1,) * 4, groups=64), dtype
        ),
    ):
        if template.takes(workload, machine):
            profile = profile_weight(weight)
            for config in list(template.space(workload, machine))[:3]:
                us = template.estimate(workload, machine, profile, config)
                bound = bound_by(template, workload, machine, profile, config)
                assert bool(bound) == math.isfinite(us)
                found += 1
    assert found or template is METASCHEDULE or dtype not in template.dtypes


def test_a_schedule_that_nothing_is_counted_of_is_bound_by_nothing_known() -> None:
    profile = profile_weight(np.ones((64, 32), np.float32))
    assert bound_by(METASCHEDULE, MATMUL, AVX512, profile, {}) is None


def test_a_kernel_for_one_token_is_bound_by_its_weight() -> None:
    workload = Workload("matmul", MatmulGeometry(4096, 4096, 1))
    template = next(t for t in ALL_TEMPLATES if t.name == "gemv")
    profile = profile_weight(np.ones((8, 8), np.float32))
    config = template.space(workload, AVX512)[0]
    assert bound_by(template, workload, AVX512, profile, config) == "memory"
