"""The kernel of bitmaps agrees with float64, and is planned for few tokens."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from emulator import cuda_source, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import MACHINE, check_kernel, configurations, run_kernel
from layer_reference import EPILOGUES, weight_for
from test_cuda_machine_code import NVCC
from test_cuda_machine_code import pytestmark as needs_nvcc
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.cuda import cost
from tvm_sparse.schedules.cuda.threads import WARP
from tvm_sparse.schedules.lookup import template_named, templates_for

from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.formats import FORMATS
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

NAME = "cuda_bitmap_tiles"
TEMPLATE = template_named(NAME)

# What large layers are planned with, beside the choice for a small one.
LARGE = {"mt": 64, "warps_m": 2, "warps_k": 4, "stages": 3, "kb": 256}
WIDE = {"mt": 64, "warps_m": 1, "warps_k": 4, "stages": 3, "kb": 128}

dtypes = st.sampled_from(["float16", "bfloat16"])
copies = st.sampled_from(["late", "early"])
few_tokens = st.sampled_from([1, 7, 8, 16, 33, 64])


def layer(m, k, n, density, dtype="float16", epilogue="none", seed=0):
    geometry = MatmulGeometry(m, k, n)
    workload = Workload("matmul", geometry, dtype, EPILOGUES[epilogue])
    return workload, weight_for(geometry, density, seed, dtype)


@needs_compiler
@settings(max_examples=12)
@given(
    dtype=dtypes,
    m=st.sampled_from([1, 16, 50, 130]),
    k=st.sampled_from([8, 64, 136, 520]),
    n=few_tokens,
    density=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    symbolic=st.booleans(),
    choice=st.integers(0, 99),
    copies=copies,
    seed=st.integers(0, 99),
)
def test_products_agree_with_float64(
    dtype, m, k, n, density, epilogue, symbolic, choice, copies, seed
):
    workload, weight = layer(m, k, None if symbolic else n, density, dtype, epilogue, seed)
    check_kernel(NAME, workload, weight, choice, n, seed, copies)


@needs_compiler
@pytest.mark.parametrize("n", [16, 64])
def test_every_configuration_agrees_with_float64(n):
    workload, weight = layer(70, 136, n, 0.3, epilogue="bias")
    for number, _ in enumerate(configurations(TEMPLATE, workload, weight)):
        check_kernel(NAME, workload, weight, number, n)


@needs_compiler
def test_chunks_without_a_nonzero_are_skipped():
    workload, weight = layer(64, 1024, 8, 0.5)
    weight[64:800] = 0
    check_kernel(NAME, workload, weight, 0, 8)


# Of a fragment's 256 elements more than 64 values share banks.
@needs_compiler
@pytest.mark.parametrize(("density", "most"), [(0.1, 1.0), (0.2, 1.01), (0.3, 1.3), (0.4, 1.7)])
def test_decoding_has_few_bank_conflicts_and_loading_tokens_none(density, most):
    config = {"mt": 32, "warps_m": 1, "warps_k": 4, "stages": 3, "kb": 128, "nt": 16}
    geometry = MatmulGeometry(32, 512, 16)
    rng = np.random.default_rng(0)
    weight = (rng.random((512, 32)) < density).astype("float16")
    workload = Workload("matmul", geometry, "float16")
    (traffic,) = run_kernel(NAME, workload, weight, config, 16, count_conflicts=True).values()
    decoded = [counts for line, counts in traffic.by_site.items() if "expand_pairs" in line]
    wavefronts, ideal = (sum(counts[i] for counts in decoded) for i in range(2))
    assert wavefronts <= most * ideal
    tokens = [counts for line, counts in traffic.by_site.items() if "load_matrices" in line]
    assert tokens
    assert all(wavefronts == ideal for wavefronts, ideal in tokens)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (MatmulGeometry(64, 60, 8), "60 features"),
        (MatmulGeometry(64, 64, 200), "200 tokens"),
        (MatmulGeometry(64, 64, 8, "features"), "tokens in rows"),
        (Conv2dGeometry(1, 8, 8, 8, 8, (1, 1)), "tokens in rows"),
    ],
)
def test_what_it_is_not_for_is_refused_with_a_reason(geometry, words):
    op = "matmul" if isinstance(geometry, MatmulGeometry) else "conv2d"
    match = TEMPLATE.takes(Workload(op, geometry, "float16"), MACHINE)
    assert not match
    assert words in match.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mt": 48}, "rows in 'mt'"),
        ({"nt": 24}, "tokens in 'nt'"),
        ({"warps_m": 3}, "among 3 warps"),
        ({"warps_k": 3}, "among 3 warps"),
        ({"stages": 1}, "2 to 8 stages"),
        ({"mt": 128, "warps_m": 1, "warps_k": 4, "nt": 64}, "fragments of sums"),
        ({"kb": 512, "stages": 8, "nt": 64}, "cannot hold"),
    ],
)
def test_a_configuration_that_makes_no_kernel_is_refused(change, words):
    workload, _ = layer(256, 1024, 16, 0.2)
    config = {**TEMPLATE.space(workload, MACHINE)[0], **change}
    assert words in TEMPLATE.check(workload, MACHINE, config)


@lru_cache(maxsize=4)
def random_profile(rows, columns, density):
    rng = np.random.default_rng(0)
    return profile_weight((rng.random((rows, columns)) < density).astype("float16"))


def fastest(templates, geometry, machine, profile):
    """Return the template and the configuration that the cost model expects to be fastest."""
    workload = Workload("matmul", geometry, "float16")
    found = [
        (template.estimate(workload, machine, profile, config), template, config)
        for template in templates
        if template.takes(workload, machine)
        for config in template.space(workload, machine)
    ]
    return min(found, key=lambda entry: entry[0])[1:]


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
@pytest.mark.parametrize("density", [0.2, 0.3])
def test_it_is_planned_for_few_tokens_and_not_for_many(density, target):
    machine = machine_of(resolve_target(target))
    profile = random_profile(4096, 4096, density)
    for n, is_it in ((8, True), (16, True), (32, True), (512, False), (4096, False)):
        geometry = MatmulGeometry(4096, 4096, n)
        template, _ = fastest(templates_for(machine), geometry, machine, profile)
        assert (template.name == NAME) == is_it, n


def test_bytes_bind_a_large_layer():
    profile = random_profile(1024, 4096, 0.3)
    profile = replace(profile, shape=(16384, 4096), nnz=16 * profile.nnz)
    geometry = MatmulGeometry(16384, 4096, 8)
    _, config = fastest([TEMPLATE], geometry, MACHINE, profile)
    events = TEMPLATE.events(Workload("matmul", geometry, "float16"), MACHINE, profile, config)
    assert cost.binds(events, MACHINE) == "memory"
    assert events["bytes"] < 0.4 * 2 * profile.size


def test_memory_is_slower_when_less_is_under_way():
    config = {**LARGE, "nt": 8}
    workload, _ = layer(4096, 4096, 8, 0.3)
    events = TEMPLATE.events(workload, MACHINE, random_profile(4096, 4096, 0.3), config)
    times = [
        cost.microseconds({**events, "in_flight": 1e3 * kilobytes}, MACHINE)
        for kilobytes in (2000, 1000, 100, 50)
    ]
    assert times[0] == times[1] < times[2]
    assert times[3] - cost.LAUNCH_US == pytest.approx(2 * (times[2] - cost.LAUNCH_US))


def built(target, n, config, dtype):
    machine = machine_of(resolve_target(target))
    workload, weight = layer(512, 1024, n, 0.25, dtype, "bias+residual+relu")
    view = matrix_view(weight, "matmul")
    config = config or min(
        TEMPLATE.space(workload, machine),
        key=lambda c: TEMPLATE.estimate(workload, machine, profile_weight(view), c),
    )
    packed = FORMATS[TEMPLATE.format].pack(view, config)
    events = TEMPLATE.events(workload, machine, profile_weight(view), config)
    return TEMPLATE.build(workload, machine, packed, config), config, events, machine


@needs_nvcc
@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90", "cuda-sm90a"])
@pytest.mark.parametrize(
    ("n", "config", "dtype"),
    [
        (16, None, "float16"),
        (16, {**LARGE, "nt": 16}, "float16"),
        (64, {**WIDE, "nt": 64}, "bfloat16"),
    ],
)
def test_machine_code_keeps_in_registers_and_fits_as_often_as_planned(
    n, config, dtype, target, tmp_path
):
    function, config, events, machine = built(target, n, config, dtype)
    (tmp_path / "kernel.cu").write_text(cuda_source(function, target))
    command = [NVCC, f"-arch={machine.arch}", "-w", "-std=c++17", "kernel.cu"]
    options = ["-cubin", "-Xptxas", "-v", "-o", "kernel.cubin"]
    told = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told
    registers = -(-int(re.search(r"Used (\d+) registers", told)[1]) // 8) * 8
    warps = config["warps_m"] * config["warps_k"]
    assert registers * warps * WARP * events["at_once"] <= machine.registers
    subprocess.run([*command, "-ptx", "-o", "kernel.ptx"], cwd=tmp_path, check=True)
    ptx = (tmp_path / "kernel.ptx").read_text()
    assert ".local" not in ptx
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{short}" in ptx
    assert "cp.async.cg.shared.global" in ptx and "ldmatrix.sync" in ptx


def test_layers_of_one_shape_share_a_kernel():
    workload, _ = layer(512, 1024, 16, 0.2)
    config = {**LARGE, "nt": 16}
    functions = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        weight = (rng.random((512, 1024)) < 0.2).astype(numpy_dtype("float16"))
        packed = FORMATS[TEMPLATE.format].pack(weight, config)
        functions.append(TEMPLATE.build(workload, MACHINE, packed, config))
    assert functions[0].script() == functions[1].script()
