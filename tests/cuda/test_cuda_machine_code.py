"""What nvcc makes of the kernels: no spills, wide loads, and the occupancy that plans count on."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator import cuda_source, kernel_names
from layer_reference import EPILOGUES, weight_for
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.cuda.threads import WARP
from tvm_sparse.schedules.lookup import template_named
from weights import pattern

from tvm_sparse.cuda_toolkit import compile_source, find_nvcc
from tvm_sparse.errors import TargetError
from tvm_sparse.formats import FORMATS, PackedWeight
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import CudaMachine, machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

NVCC = find_nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# For sm_90a the same is planned as for sm_90.
TARGETS = ["cuda-sm80", pytest.param("cuda-sm90", marks=pytest.mark.slow), "cuda-sm90a"]

# For CUDA cores, and for tensor cores.
LAYERS = {
    "feed-forward": MatmulGeometry(768, 3072, 12800),
    "few tokens": MatmulGeometry(768, 768, 16),
    "3x3": Conv2dGeometry(32, 128, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1)),
    "3x3 in steps of two": Conv2dGeometry(1, 64, 56, 56, 128, (3, 3), (2, 2), (1, 1, 1, 1)),
    "1x1": Conv2dGeometry(8, 256, 14, 14, 1024, (1, 1)),
}
TENSOR_LAYERS = {
    "feed-forward": MatmulGeometry(768, 3072, 12800),
    "square": MatmulGeometry(4096, 4096, 4096),
    "few tokens": MatmulGeometry(768, 3072, 16),
    "3x3": Conv2dGeometry(32, 128, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1)),
    "1x1": Conv2dGeometry(32, 256, 14, 14, 1024, (1, 1)),
}
# Patterns that the templates for tensor cores are made for, see `weights.pattern`.
PATTERNS = {
    "cuda_tile_wise": "tile-wise",
    "cuda_two_four": "2:4",
    "cuda_tile_wise_two_four": "V:N:M",
}
# How else activations can lie in memory: nothing is known about how they are aligned.
UNALIGNED = {
    "any tokens": MatmulGeometry(768, 3072, None),
    "features of any tokens": MatmulGeometry(768, 3072, None, "features"),
    "features": MatmulGeometry(768, 3072, 12800, "features"),
    "odd 1x1": Conv2dGeometry(32, 1024, 7, 7, 256, (1, 1)),
}


@dataclass(frozen=True)
class Compiled:
    """What nvcc said about the kernels of a source, by their names; and its PTX."""

    registers: Mapping[str, int]
    spilled: Sequence[str]
    ptx: str


def compiled(source: str, arch: str) -> Compiled:
    """Compile a source to machine code."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cu").write_text(source)
        command = [NVCC, f"-arch={arch}", "-w", "-std=c++17", "-cubin", "-keep", "-Xptxas", "-v"]
        told = subprocess.run(
            [*command, "-o", "kernel.cubin", "kernel.cu"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        ptx = (Path(folder) / "kernel.ptx").read_text()
    registers, spilled = {}, []
    for kernel in told.split("Compiling entry function '")[1:]:
        name = kernel.split("'", 1)[0]
        registers[name] = int(re.search(r"Used (\d+) registers", kernel)[1])
        if "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" not in kernel:
            spilled.append(name)
    return Compiled(registers, spilled, ptx)


@dataclass(frozen=True)
class Planned:
    """A layer's kernel at a configuration."""

    source: str
    config: Mapping[str, Any]
    events: Mapping[str, float]
    machine: CudaMachine

    @property
    def main(self) -> str:
        """The kernel that multiplies: the last one."""
        return kernel_names(self.source)[-1]

    def shared_bytes(self) -> int:
        """Tell what it is launched with."""
        told = rf"// {self.main} is launched with (\d+) bytes"
        return int(re.search(told, self.source)[1])


def workload_of(geometry: Any, dtype: str, epilogue: str = "bias+residual+relu") -> Workload:
    op = "matmul" if isinstance(geometry, MatmulGeometry) else "conv2d"
    return Workload(op, geometry, dtype, EPILOGUES[epilogue])


def built(template_name: str, target: str, workload: Workload, view: Any, config: Any) -> Planned:
    """Build a kernel for a matrix."""
    template, machine = template_named(template_name), machine_of(resolve_target(target))
    profile = profile_weight(view)
    if config is None:
        config = min(
            template.space(workload, machine),
            key=lambda c: template.estimate(workload, machine, profile, c),
        )
    packed = PackedWeight(template.format, view.shape, {"in_order": 1}, {})
    if template.format in ("row_tiles", "bitmap_tiles"):
        packed = FORMATS[template.format].pack(view, config)
    function = template.build(workload, machine, packed, config)
    events = template.events(workload, machine, profile, config)
    return Planned(cuda_source(function, target), config, events, machine)


def check_occupancy(planned: Planned, told: Compiled, threads: int) -> None:
    """Hold what nvcc used, and what shared memory is asked for, against the plan."""
    machine, at_once = planned.machine, int(planned.events["at_once"])
    assert told.registers[planned.main] * threads * at_once <= machine.registers
    # A block takes a kilobyte more than it asks for.
    shared = planned.shared_bytes()
    assert shared <= machine.block_shared_bytes
    assert (shared + 1024) * at_once <= machine.shared_bytes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", list(LAYERS))
def test_a_planned_kernel_keeps_in_registers_and_fits_as_often_as_planned(layer, target):
    geometry = LAYERS[layer]
    workload = workload_of(geometry, "float32")
    view = matrix_view(weight_for(geometry, 0.1, 0), workload.op)
    planned = built("cuda_row_tiles", target, workload, view, None)
    told = compiled(planned.source, planned.machine.arch)
    assert not told.spilled
    check_occupancy(planned, told, planned.config["warps"] * WARP)
    assert ".local" not in told.ptx
    if layer == "feed-forward":
        assert "ld.shared.v4.f32" in told.ptx and "ld.global.nc.v4.f32" in told.ptx


def check_tensor_kernel(template_name: str, layer: str, target: str, dtype: str) -> None:
    workload = workload_of(TENSOR_LAYERS[layer], dtype)
    rows, columns = TENSOR_LAYERS[layer].weight_shape
    view = pattern(PATTERNS[template_name], rows, columns, dtype)
    planned = built(template_name, target, workload, view, None)
    told = compiled(planned.source, planned.machine.arch)
    assert not told.spilled and ".local" not in told.ptx
    warps = [planned.config[f"warps_{axis}"] for axis in "mnk"]
    check_occupancy(planned, told, int(np.prod(warps)) * WARP)
    short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    dense = f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32"
    sparse = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{short}.{short}.f32"
    assert (dense in told.ptx) == ("tile_wise" in template_name)
    assert (sparse in told.ptx) == ("two_four" in template_name)
    # Fragments of either operand come whole from shared memory, and chunks whole from memory.
    turned = ".trans" if workload.op == "conv2d" or planned.config["run"] == 1 else ""
    assert re.search(rf"ldmatrix.sync.aligned.m8n8.x[24]{turned}.shared.b16", told.ptx)
    assert re.search(r"ld\.shared\.v4\.[ubf]32", told.ptx)
    assert re.search(r"cp\.async\.cg\.shared\.global \[\S+\], \[\S+\], 16;", told.ptx)
    is_turned = workload.op == "matmul" and planned.config["run"] == 1
    assert len(told.registers) == (2 if is_turned else 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", list(TENSOR_LAYERS))
@pytest.mark.parametrize("template_name", list(PATTERNS))
def test_a_planned_kernel_keeps_tensor_cores_fed(template_name, layer, target):
    check_tensor_kernel(template_name, layer, target, "float16")


def test_bfloat16_has_the_same_instructions():
    check_tensor_kernel("cuda_tile_wise_two_four", "square", "cuda-sm80", "bfloat16")


def whole_spaces(target: str) -> list[tuple[str, Workload, Mapping[str, Any]]]:
    """List every configuration of every template, for every kind of layer."""
    machine = machine_of(resolve_target(target))
    found = []
    for name, dtype, layers in [
        ("cuda_row_tiles", "float32", LAYERS),
        *[
            (name, dtype, {**TENSOR_LAYERS, **UNALIGNED})
            for name in (*PATTERNS, "cuda_bitmap_tiles")
            for dtype in ("float16", "float32")
        ],
    ]:
        for geometry in layers.values():
            workload = workload_of(geometry, dtype, "bias+gelu")
            template = template_named(name)
            space = template.space(workload, machine) if template.takes(workload, machine) else []
            found += [(name, workload, config) for config in space]
    return found


def spilling(target: str, cases: Sequence[tuple[str, Workload, Mapping[str, Any]]]) -> list[str]:
    """Name the kernels that do not keep in registers."""

    def check(source: str, arch: str, case: Any) -> list[str]:
        told = compiled(source, arch)
        return [f"{case}: {told.registers[name]} registers" for name in told.spilled]

    with ThreadPoolExecutor(2) as pool:
        answers = []
        for name, workload, config in cases:
            rows, columns = workload.geometry.weight_shape
            view = pattern("unstructured", rows, columns, workload.dtype)
            planned = built(name, target, workload, view, config)
            case = (name, workload.geometry, dict(config))
            answers.append(pool.submit(check, planned.source, planned.machine.arch, case))
        return [line for answer in answers for line in answer.result()]


def test_configurations_here_and_there_do_not_spill():
    cases = whole_spaces("cuda-sm80")
    assert spilling("cuda-sm80", cases[7 :: len(cases) // 16]) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90a"])
def test_no_configuration_spills(target):
    assert spilling(target, whole_spaces(target)) == []


def test_the_compiler_s_complaint_is_told():
    with pytest.raises(TargetError, match=r"nvcc cannot compile for sm_80: .*declaration"):
        compile_source(NVCC, "nonsense;", "sm_80")


def test_a_fat_binary_holds_code_for_the_architecture():
    source = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] = 0; }'
    assert len(compile_source(NVCC, source, "sm_90")) > len(np.zeros(1000, np.uint8))
