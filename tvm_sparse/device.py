"""Where a module runs: the processor, or a GPU that tensors are copied to and from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# DLPack's numbers.
CPU, CUDA = 1, 2
_POOLED_ALLOCATOR = 2


def device_kind(target: Mapping[str, Any]) -> int:
    """Tell from a target's data what its modules run on."""
    return CUDA if target.get("kind") == "cuda" else CPU


def machine_devices(kind: int) -> tuple[int, ...]:
    """Return what TVM's virtual machine is initialised with: devices, and how they allocate.

    Beside a GPU it needs the processor, where shapes are computed.
    """
    host = (CPU, 0, _POOLED_ALLOCATOR)
    return host if kind == CPU else (kind, 0, _POOLED_ALLOCATOR, *host)


def moved(tensor: Any, kind: int) -> Any:
    """Copy a tensor to the first device of a kind, and wait for it; one that is there stays."""
    import tvm_ffi

    if tensor.device.dlpack_device_type() == kind:
        return tensor
    device = tvm_ffi.device(kind, 0)
    allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    copy = allocate(tvm_ffi.Shape(tensor.shape), tensor.dtype, device, None)
    tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")(tensor, copy)
    for each in (tensor.device, device):
        if each.dlpack_device_type() != CPU:
            tvm_ffi.get_global_func("runtime.Device_StreamSync")(each, 0)
    return copy
