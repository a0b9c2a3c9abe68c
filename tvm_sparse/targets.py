"""Targets: short names, TVM's own dictionaries, and what kernels must know of a processor."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cpu_features import cache_bytes, missing_features, required_features
from .errors import TargetError
from .plain_data import parse_json

TargetLike = str | Mapping[str, Any] | Any


def _x86(mcpu: str) -> dict[str, Any]:
    return {"kind": "llvm", "mcpu": mcpu}


def _cuda(arch: str) -> dict[str, Any]:
    """Describe a GPU, and the processor beside it: one as every server with such a GPU has."""
    return {
        "kind": "cuda",
        "arch": arch,
        "max_threads_per_block": 1024,
        # What a block has without asking for more.
        "max_shared_memory_per_block": 48 << 10,
        "thread_warp_size": 32,
        "host": _x86("x86-64-v3"),
    }


# "native" is resolved on the machine itself.
SHORT_NAMES: dict[str, dict[str, Any]] = {
    "x86-64-v2": _x86("x86-64-v2"),
    "x86-64-v3": _x86("x86-64-v3"),
    "x86-64-v4": _x86("x86-64-v4"),
    "cuda-sm80": _cuda("sm_80"),
    "cuda-sm86": _cuda("sm_86"),
    "cuda-sm89": _cuda("sm_89"),
    "cuda-sm90": _cuda("sm_90"),
    "cuda-sm90a": _cuda("sm_90a"),
}


# Processors that run 512-bit instructions on data paths of 256 bits.
_HALF_WIDTH = frozenset({"znver4"})


@dataclass(frozen=True)
class X86Machine:
    """The vector unit and caches that x86 kernel templates are shaped by.

    Attributes
    ----------
    lanes : int
        float32 elements of one vector register.
    registers : int
        Vector registers.
    l1_bytes, l2_bytes, l3_bytes : int
        Data caches that one core has or shares: L1 and L3 as this machine says when it is the
        target.
    threads : int
        Threads that a compiled module is planned for.
    fma_per_cycle : int
        Vector multiply-adds issued a cycle: 1 where the data paths are half as wide as the vector.
    gigahertz : float
        Clock that turns estimated cycles into time: nominal, or measured by `calibration`.
    prices : tuple of (str, float)
        Cycles per event that a calibration of this machine found; the cost model's table has the
        others.
    """

    mcpu: str
    lanes: int
    registers: int
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    threads: int = 1
    fma_per_cycle: int = 2
    gigahertz: float = 4.0
    prices: tuple[tuple[str, float], ...] = ()
    l3_bytes: int = 32 << 20

    @property
    def name(self) -> str:
        """The processor, for reports."""
        return self.mcpu


@dataclass(frozen=True)
class CudaMachine:
    """What CUDA kernel templates and their cost model must know of a GPU.

    Attributes
    ----------
    arch : str
        As nvcc names it, for example "sm_90".
    multiprocessors, cores : int
        Multiprocessors, and float32 multiply-adds that one issues a cycle.
    tensor_macs : int
        float16 multiply-adds a cycle of one multiprocessor's tensor cores, of dense operands.
    shared_bytes, block_shared_bytes : int
        Shared memory of a multiprocessor, and the most that one block may have of it.
    registers : int
        32-bit registers of a multiprocessor.
    max_threads : int
        Threads that a multiprocessor holds at once.
    gigahertz, memory_gbytes : float
        Clock under load, and memory's rate in 1e9 bytes a second.
    l2_bytes : int
    l2_gbytes : float
        L2's rate in 1e9 bytes a second.
    warp_share : float
        Share of `tensor_macs` that instructions of one warp reach: the latest tensor cores want
        those of four warps (`wgmma`).
    threads : int
        Threads of the host that a module is planned for; kernels run on the GPU.
    """

    arch: str
    multiprocessors: int
    cores: int
    tensor_macs: int
    shared_bytes: int
    block_shared_bytes: int
    gigahertz: float
    memory_gbytes: float
    l2_bytes: int
    l2_gbytes: float
    max_threads: int = 2048
    warp_share: float = 1.0
    registers: int = 64 << 10
    threads: int = 1

    @property
    def name(self) -> str:
        """The architecture, for reports."""
        return self.arch


Machine = X86Machine | CudaMachine

# By compute capability: the data-centre GPU of a generation, or its most usual one (NVIDIA's
# architecture white papers, and the table of compute capabilities in the CUDA programming guide).
# L2's rates are those that microbenchmarks reach, and so is the share of an H100's tensor cores
# that `mma` does (W. Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture
# via Microbenchmarking", arXiv 2402.13499).
_GPUS: tuple[tuple[int, CudaMachine], ...] = (
    (80, CudaMachine("sm_80", 108, 64, 1024, 164 << 10, 163 << 10, 1.41, 1555, 40 << 20, 4000)),
    (86, CudaMachine("sm_86", 84, 128, 512, 100 << 10, 99 << 10, 1.74, 696, 6 << 20, 2000, 1536)),
    (89, CudaMachine("sm_89", 142, 128, 512, 100 << 10, 99 << 10, 2.5, 864, 96 << 20, 4000, 1536)),
    (
        90,
        CudaMachine(
            "sm_90", 132, 128, 2048, 228 << 10, 227 << 10, 1.75, 3350, 50 << 20, 5500, 2048, 0.62
        ),
    ),
)


def resolve_target(target: TargetLike) -> Any:
    """Turn a short name, JSON, a dictionary or a target into a `tvm.target.Target`.

    Raises
    ------
    TargetError
        When the name is unknown or TVM rejects the description.
    """
    import tvm

    if isinstance(target, tvm.target.Target):
        return target
    if isinstance(target, str):
        if target.lstrip().startswith("{"):
            try:
                target = parse_json(target)
            except ValueError as error:
                raise TargetError(f"the target is not valid JSON: {error}") from None
        elif target in ("native", "llvm"):
            target = _native()
        elif target in SHORT_NAMES:
            target = SHORT_NAMES[target]
        else:
            known = ", ".join(["native", *SHORT_NAMES])
            raise TargetError(
                f"unknown target '{target}'; known names are {known}, or a TVM target as JSON"
            )
    try:
        return tvm.target.Target(dict(target))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TargetError(f"TVM does not accept the target {target}: {lines[-1]}") from None


def _native() -> dict[str, Any]:
    """Describe this machine: its processor, without what a virtual machine hides of it."""
    import tvm
    from tvm.target import codegen

    target = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}
    hidden = missing_features(required_features(tvm.target.Target(target)))
    if hidden:
        target["mattr"] = [f"-{feature}" for feature in hidden]
    return target


def target_data(target: Any) -> dict[str, Any]:
    """Describe a target by plain data, from which `resolve_target` makes it again."""
    plain = {
        str(key): value if isinstance(value, (str, int, float)) else [str(item) for item in value]
        for key, value in target.attrs.items()
    }
    host = {} if target.host is None else {"host": target_data(target.host)}
    return {"kind": str(target.kind.name), **plain, **host}


def machine_of(target: Any, threads: int | None = None) -> Machine:
    """Tell what kernels must know of a target.

    Raises
    ------
    TargetError
        When the target is neither an x86 processor nor an NVIDIA GPU that there are kernels for.
    """
    if target.kind.name == "cuda":
        return _gpu(str(target.attrs.get("arch", "")), threads or 1)
    if target.kind.name == "llvm":
        return x86_machine(target, threads)
    raise TargetError(
        f"no kernels for targets of kind '{target.kind.name}' yet; use an x86 or a CUDA target"
    )


def _gpu(arch: str, threads: int) -> CudaMachine:
    found = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    if found is None:
        raise TargetError(f"the CUDA target has the architecture '{arch}'; it is written as sm_80")
    known = [gpu for capability, gpu in _GPUS if capability <= int(found.group(1))]
    if not known:
        raise TargetError(f"no kernels for {arch}: they need compute capability 8.0 or higher")
    return replace(known[-1], arch=arch, threads=threads)


def x86_machine(target: Any, threads: int | None = None) -> X86Machine:
    """Read the vector width of an LLVM x86 target, and count its threads.

    Raises
    ------
    TargetError
        When the target is not an x86 processor.
    """
    from tvm.target import codegen

    mcpu = str(target.attrs.get("mcpu", "x86-64-v2"))
    features = set(codegen.llvm_get_cpu_features(target))
    if "sse2" not in features:
        raise TargetError(
            f"the target '{mcpu}' is not an x86 processor; only x86 kernels exist yet"
        )
    lanes = 16 if "avx512f" in features else 8 if "avx2" in features else 4
    count = (
        threads
        if threads is not None
        else int(os.environ.get("TVM_NUM_THREADS", "0")) or os.cpu_count() or 1
    )
    return X86Machine(
        mcpu=mcpu,
        lanes=lanes,
        registers=32 if lanes == 16 else 16,
        l1_bytes=_l1_bytes(mcpu),
        threads=count,
        fma_per_cycle=1 if lanes == 16 and mcpu in _HALF_WIDTH else 2,
        l3_bytes=_l3_bytes(mcpu),
    )


def _l1_bytes(mcpu: str) -> int:
    """Ask the system for the data cache, if the target is this machine's processor."""
    size = cache_bytes(1) if _is_native(mcpu) else X86Machine.l1_bytes
    # Some virtual machines say nonsense.
    return size if 16 << 10 <= size <= 256 << 10 else X86Machine.l1_bytes


def _l3_bytes(mcpu: str) -> int:
    """Ask the system for the last cache, if the target is this machine's processor."""
    size = cache_bytes(3) if _is_native(mcpu) else X86Machine.l3_bytes
    return size if 1 << 20 <= size <= 2 << 30 else X86Machine.l3_bytes


def _is_native(mcpu: str) -> bool:
    from tvm.target import codegen

    return bool(mcpu == codegen.llvm_get_system_cpu())
