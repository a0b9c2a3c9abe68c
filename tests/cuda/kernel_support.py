"""CUDA kernels of whole layers, emulated, against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import tvm_ffi
from emulator import SharedTraffic, cuda_source, emulate, kernel_names, value_of
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


def launches_of(function: Any, sizes: dict[str, int]) -> list[tuple[list[int], list[int]]]:
    """Return the blocks and threads of each kernel of a PrimFunc along x, y, z.

    `sizes` are those of variables.
    """
    launches: list[tuple[list[int], list[int]]] = []

    def note(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.THREAD_BINDING:
            return None
        launches.append(_launch_of(loop, sizes))
        return tvm_ffi.WalkResult.SKIP

    tvm_ffi.structural_walk(function, (tirx.For, note), order="pre")
    return launches


def _launch_of(nest: Any, sizes: dict[str, int]) -> tuple[list[int], list[int]]:
    extents: dict[str, int] = {}

    def note(loop: Any) -> None:
        if loop.kind == tirx.ForKind.THREAD_BINDING:
            extents[str(loop.thread_binding.thread_tag)] = _value(loop.extent, sizes)

    tvm_ffi.structural_walk(nest, (tirx.For, note))
    axes = [
        [extents.get(f"{kind}.{axis}", 1) for axis in "xyz"] for kind in ("blockIdx", "threadIdx")
    ]
    return axes[0], axes[1]


def workspace_of(function: Any, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Allocate the arrays that a PrimFunc's kernels leave for each other, full of NaN, by name."""
    arrays: dict[str, np.ndarray] = {}

    def note(statement: Any) -> None:
        buffer = statement.buffer
        if buffer.scope() == "global":
            shape = [_value(extent, sizes) for extent in buffer.shape]
            array = np.empty(shape, np.dtype(str(buffer.dtype)))
            array.view(np.uint8).fill(0xFF)
            arrays[str(buffer.name)] = array

    tvm_ffi.structural_walk(function, (tirx.AllocBuffer, note))
    return arrays


def run_kernels(
    function: Any,
    arguments: Mapping[str, Any],
    sizes: dict[str, int],
    target: str = TARGET,
    **options: Any,
) -> dict[str, SharedTraffic]:
    """Emulate the kernels of a PrimFunc one after the other.

    Parameters
    ----------
    arguments : mapping of str to numpy.ndarray or int
        By the names of the PrimFunc's parameters.
    sizes : mapping of str to int
        Of the variables that shapes and launches depend on.
    **options
        Of `emulate`.
    """
    source = cuda_source(function, target)
    given = {**sizes, **workspace_of(function, sizes), **arguments}
    launches = zip(kernel_names(source), launches_of(function, sizes), strict=True)
    return {
        name: emulate(source, given, grid, block, kernel=name, **options)
        for name, (grid, block) in launches
    }


def _value(extent: Any, sizes: dict[str, int]) -> int:
    return int(extent.value) if hasattr(extent, "value") else value_of(str(extent), sizes)


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
) -> dict[str, SharedTraffic]:
    """Build a kernel, emulate it, and compare with float64; return what its launches counted."""
    template = template_named(template_name)
    assert template.takes(workload, MACHINE)
    packed = FORMATS[template.format].pack(matrix_view(weight, workload.op), config)
    function = template.build(workload, MACHINE, packed, config)
    x, channels, tensors, shape = operands(workload, batch, seed)
    want, bound = reference(workload, weight, x, channels, tensors, template.on_tensor_cores)
    if getattr(workload.geometry, "layout", "") == "features":
        x, shape, want, bound = _turned(x), shape[::-1], want.T, bound.T
        tensors = [_turned(tensor) for tensor in tensors]
    y = np.full(shape, np.nan, x.dtype)
    arrays = template.arguments(workload, packed)
    named = {"x": x, **dict(zip(packed.arrays, arrays, strict=True)), "y": y, "n": batch}
    named |= {f"channel{i}": value for i, value in enumerate(channels)}
    named |= {f"tensor{i}": value for i, value in enumerate(tensors)}
    traffic = run_kernels(
        function, named, {"n": batch}, copies=copies, count_conflicts=count_conflicts
    )
    result = compare(f"{template_name} {dict(config)}", y, want, bound)
    assert result.ok, result
    return traffic


def _turned(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
