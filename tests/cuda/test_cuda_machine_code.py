"""What nvcc makes of the kernels: no spills, wide loads, and the occupancy that plans count on."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from emulator import cuda_source
from layer_reference import EPILOGUES, weight_for
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.cuda.threads import WARP
from tvm_sparse.schedules.lookup import template_named

from tvm_sparse.cuda_toolkit import compile_source, find_nvcc
from tvm_sparse.errors import TargetError
from tvm_sparse.formats import FORMATS
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

NVCC = find_nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

LAYERS = {
    "feed-forward": MatmulGeometry(768, 3072, 12800),
    "few tokens": MatmulGeometry(768, 768, 16),
    "3x3": Conv2dGeometry(32, 128, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1)),
    "3x3 in steps of two": Conv2dGeometry(1, 64, 56, 56, 128, (3, 3), (2, 2), (1, 1, 1, 1)),
    "1x1": Conv2dGeometry(8, 256, 14, 14, 1024, (1, 1)),
}


def planned_kernel(target: str, geometry):
    """Build a layer's kernel at the configuration that the cost model expects to be fastest."""
    op = "matmul" if isinstance(geometry, MatmulGeometry) else "conv2d"
    workload = Workload(op, geometry, epilogue=EPILOGUES["bias+residual+relu"])
    template, machine = template_named("cuda_row_tiles"), machine_of(resolve_target(target))
    view = matrix_view(weight_for(geometry, 0.1, 0), op)
    profile = profile_weight(view)
    config = min(
        template.space(workload, machine),
        key=lambda c: template.estimate(workload, machine, profile, c),
    )
    packed = FORMATS[template.format].pack(view, config)
    events = template.events(workload, machine, profile, config)
    return template.build(workload, machine, packed, config), config, events, machine


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90", "cuda-sm90a"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_a_planned_kernel_keeps_in_registers_and_fits_as_often_as_planned(layer, target, tmp_path):
    function, config, events, machine = planned_kernel(target, LAYERS[layer])
    (tmp_path / "kernel.cu").write_text(cuda_source(function, target))
    command = [NVCC, f"-arch={machine.arch}", "-w", "-std=c++17", "kernel.cu"]
    told = subprocess.run(
        [*command, "-cubin", "-Xptxas", "-v", "-o", "kernel.cubin"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told
    registers = int(re.search(r"Used (\d+) registers", told)[1])
    threads = config["warps"] * WARP
    assert registers * threads * events["at_once"] <= machine.registers
    subprocess.run([*command, "-ptx", "-o", "kernel.ptx"], cwd=tmp_path, check=True)
    ptx = (tmp_path / "kernel.ptx").read_text()
    assert ".local" not in ptx
    if layer == "feed-forward":
        assert "ld.shared.v4.f32" in ptx and "ld.global.nc.v4.f32" in ptx


def test_the_compiler_s_complaint_is_told():
    with pytest.raises(TargetError, match=r"nvcc cannot compile for sm_80: .*declaration"):
        compile_source(NVCC, "nonsense;", "sm_80")


def test_a_fat_binary_holds_code_for_the_architecture():
    source = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] = 0; }'
    assert len(compile_source(NVCC, source, "sm_90")) > len(np.zeros(1000, np.uint8))
