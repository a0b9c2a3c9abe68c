"""CUDA kernels of whole layers, emulated, against float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import tvm_ffi
from emulator import SharedTraffic, cuda_source, emulate, kernel_names
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


def launches_of(
    function: Any, sizes: dict[str, int]
) -> list[tuple[list[int], list[int]]]:
    """Return the blocks and threads along x, y, z of each kernel of a PrimFunc, in their order.

    `sizes` are those of the variables in its shapes.
    """
    kernels: list[dict[str, int]] = []

    def note(loop: Any) -> None:
        if loop.kind == tirx.ForKind.THREAD_BINDING:
            tag = str(loop.thread_binding.thread_tag)
            if not kernels or tag in kernels[-1]:
                kernels.append({})
            kernels[-1][tag] = _value(loop.extent, sizes)

    tvm_ffi.structural_walk(function, (tirx.For, note))
    return [
        (
            [extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"],
            [extents.get(f"threadIdx.{axis}", 1) for axis in "xyz"],
        )
        for extents in kernels
    ]


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
    template_name: str,
    workload: Any,
    weight: np.ndarray,
    choice: int,
    batch: int,
    seed: int = 0,
    copies: Literal["late", "early"] = "late",
) -> None:
    """Build a kernel at one of its configurations, emulate it, and compare with float64."""
    template = template_named(template_name)
    space = configurations(template, workload, weight)
    run_kernel(template_name, workload, weight, space[choice % len(space)], batch, seed, copies)


def run_kernel(
    template_name: str,
    workload: Any,
    weight: np.ndarray,
    config: Mapping[str, Any],
    batch: int,
    seed: int = 0,
    copies: Literal["late", "early"] = "late",
    count_conflicts: bool = False,
) -> list[SharedTraffic]:
    """Build a kernel, emulate it, and compare with float64; return what its launches counted."""
    template = template_named(template_name)
    assert template.takes(workload, MACHINE)
    packed = FORMATS[template.format].pack(matrix_view(weight, workload.op), config)
    function = template.build(workload, MACHINE, packed, config)
    x, channels, tensors, shape = operands(workload, batch, seed)
    want, bound = reference(workload, weight, x, channels, tensors)
    if getattr(workload.geometry, "layout", "") == "features":
        x, shape, want, bound = _turned(x), shape[::-1], want.T, bound.T
        tensors = [_turned(tensor) for tensor in tensors]
    y = np.full(shape, np.nan, x.dtype)
    arrays = template.arguments(workload, packed)
    named = {"x": x, **dict(zip(packed.arrays, arrays, strict=True)), "y": y, "n": batch}
    named |= {f"channel{i}": value for i, value in enumerate(channels)}
    named |= {f"tensor{i}": value for i, value in enumerate(tensors)}
    # The memory between two launches, where there is any.
    named["turned"] = np.full((x.shape[-1], -(-x.shape[0] // 64) * 64), np.nan, x.dtype)
    source = cuda_source(function, TARGET)
    launches = launches_of(function, {"n": batch})
    traffic = [
        emulate(
            source, named, *sizes, kernel=kernel, copies=copies, count_conflicts=count_conflicts
        )
        for kernel, sizes in zip(kernel_names(source), launches, strict=True)
    ]
    result = compare(f"{template_name} {dict(config)}", y, want, bound)
    assert result.ok, result
    return traffic


def _turned(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
