"""CUDA kernels of whole layers, emulated, against float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import tvm_ffi
from emulator import cuda_source, emulate
from layer_reference import operands, reference
from tvm import tirx
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.lookup import template_named

from tvm_sparse.check import compare
from tvm_sparse.formats import FORMATS
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target

TARGET = "cuda-sm80"
MACHINE = machine_of(resolve_target(TARGET))


def launch_of(function: Any, sizes: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return the blocks and threads of a PrimFunc along x, y, z; `sizes` are those of variables."""
    extents: dict[str, int] = {}

    def note(loop: Any) -> None:
        if loop.kind == tirx.ForKind.THREAD_BINDING:
            extents[str(loop.thread_binding.thread_tag)] = _value(loop.extent, sizes)

    tvm_ffi.structural_walk(function, (tirx.For, note))
    axes = [
        [extents.get(f"{kind}.{axis}", 1) for axis in "xyz"] for kind in ("blockIdx", "threadIdx")
    ]
    return axes[0], axes[1]


def _value(extent: Any, sizes: dict[str, int]) -> int:
    if hasattr(extent, "value"):
        return int(extent.value)
    # What TVM prints is Python, on names of its own.
    printer = SimpleNamespace(int64=int, Cast=lambda _dtype, value: int(value))
    return int(eval(str(extent), {"T": printer, **sizes}))


def configurations(template: Any, workload: Any, weight: np.ndarray) -> list[dict[str, Any]]:
    """List what a template may be given for a weight: what fits into shared memory."""
    view = matrix_view(weight, workload.op)
    profile = profile_weight(view)
    space = template.space(workload, MACHINE)
    fitting = [c for c in space if template.estimate(workload, MACHINE, profile, c) < math.inf]
    return [dict(config) for config in fitting]


def check_kernel(
    template_name: str, workload: Any, weight: np.ndarray, choice: int, batch: int, seed: int = 0
) -> None:
    """Build a kernel at one of its configurations, emulate it, and compare with float64."""
    template = template_named(template_name)
    assert template.supports(workload, MACHINE)
    space = configurations(template, workload, weight)
    config = space[choice % len(space)]
    packed = FORMATS[template.format].pack(matrix_view(weight, workload.op), config)
    function = template.build(workload, MACHINE, packed, config)
    x, channels, tensors, shape = operands(workload, batch, seed)
    y = np.full(shape, np.nan, np.float32)
    named = {"x": x, **packed.arrays, "y": y, "n": batch}
    named |= {f"channel{i}": value for i, value in enumerate(channels)}
    named |= {f"tensor{i}": value for i, value in enumerate(tensors)}
    grid, block = launch_of(function, {"n": batch})
    emulate(cuda_source(function, TARGET), named, grid, block)
    want, bound = reference(workload, weight, x, channels, tensors)
    result = compare(f"{template_name} {config}", y, want, bound)
    assert result.ok, result
