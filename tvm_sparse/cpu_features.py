"""Which instruction sets compiled code may use, and which of them this machine lacks."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# LLVM's name -> the flag in Linux's /proc/cpuinfo. Only what LLVM emits for ordinary code or what a
# kernel asks for; sets that need their own intrinsics (AES, SHA, AMX, ...) or privileges are never
# emitted and left out, so that a virtual machine which hides them can still run the library.
X86_FEATURES: dict[str, str] = {
    "cx16": "cx16",
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "lzcnt": "abm",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "tbm": "tbm",
    "xop": "xop",
    "fma4": "fma4",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "gfni": "gfni",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
}

# Bytes of a data cache by level, where the system does not tell.
_USUAL_CACHES: dict[int, int] = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}


def required_features(target: Any) -> tuple[str, ...]:
    """Name the instruction sets that code for a TVM target may hold, in the order of the table.

    Parameters
    ----------
    target : tvm.target.Target
        That of a GPU stands for the processor beside it. Others than x86 need none of the table.
    """
    from tvm.target import codegen

    if target.kind.name != "llvm" and target.host is not None:
        target = target.host
    if target.kind.name != "llvm":
        return ()
    known = set(codegen.llvm_get_cpu_features(target))
    return tuple(name for name in X86_FEATURES if name in known)


def machine_flags(cpuinfo: str | Path = "/proc/cpuinfo") -> frozenset[str] | None:
    """Read the processor's flags; None where the system does not tell them in this form.

    The flags are those that every listed core has: a kernel may run on any of them.
    """
    try:
        lines = Path(cpuinfo).read_text(errors="replace").splitlines()
    except OSError:
        return None
    cores = [
        frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")
    ]
    return frozenset.intersection(*cores) if cores else None


def missing_features(required: Iterable[str], cpuinfo: str | Path = "/proc/cpuinfo") -> list[str]:
    """List what this machine lacks of `required`; empty where the machine cannot be asked.

    Parameters
    ----------
    required : iterable of str
        LLVM's names. A name that the table lacks is looked up as it stands.
    cpuinfo : path
        Where the system tells the processor's flags.
    """
    found = machine_flags(cpuinfo)
    if found is None:
        return []
    return [name for name in required if X86_FEATURES.get(name, name) not in found]


def processor_name() -> str:
    """Name this machine's processor for messages."""
    return _first_core().get("model name") or platform.processor() or platform.machine()


def machine_identity(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """Tell this machine from others, in one line: what was measured on one holds for its like.

    Clouds sell processors of several generations under one name, hence also family, model and
    stepping.

    Returns
    -------
    str
        For example ``AMD EPYC (AuthenticAMD 25/17/1), 2 cores``.
    """
    core = _first_core(cpuinfo)
    name = core.get("model name") or platform.processor() or platform.machine()
    numbers = "/".join(core.get(key, "?") for key in ("cpu family", "model", "stepping"))
    vendor = core.get("vendor_id", "unknown")
    count = os.cpu_count() or 1
    return f"{name} ({vendor} {numbers}), {count} {'core' if count == 1 else 'cores'}"


def available_cores() -> list[int]:
    """List the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cache_bytes(level: int, caches: str | Path = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """Return the size of a core's data cache of a level; a usual one where nothing tells it."""
    for entry in sorted(Path(caches).glob("index*")):
        try:
            told = {key: (entry / key).read_text().strip() for key in ("level", "type", "size")}
            if told["level"] == str(level) and told["type"] != "Instruction":
                return int(told["size"].rstrip("K")) << 10
        except (OSError, ValueError):
            continue
    return _USUAL_CACHES[level]


def _first_core(cpuinfo: str | Path = "/proc/cpuinfo") -> dict[str, str]:
    """Read what the system tells of its first core; nothing where it does not."""
    try:
        text = Path(cpuinfo).read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
