"""Run the CUDA source that TVM generates on this machine's processor, threads as fibres.

The source is compiled by g++ against `emulator.hpp`. It shows wrong indices, missing barriers,
unwritten shared memory and copies that were not waited for as wrong numbers; what the hardware
leaves undefined, as `KernelFault`. It counts bank conflicts, and says nothing else about time.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir.instrument import pass_instrument

from tvm_sparse.cuda_toolkit import compiled_by
from tvm_sparse.targets import resolve_target

HEADER = Path(__file__).with_name("emulator.hpp")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# The generated text reinterprets registers as other types.
_COMMAND = ["g++", "-O1", "-w", "-std=c++17", "-fno-strict-aliasing", "-shared", "-fPIC"]
# Switching between stacks would look like an attack.
_COMMAND += ["-U_FORTIFY_SOURCE"]

_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) \{', re.M
)
_SHARED = re.compile(r"^ *extern __shared__ __align__\(\d+\) ([\w ]+) (\w+)\[\];", re.M)
# What `cuda_source` writes in front of a source, about the host's part.
_LAUNCHED = "// {} is launched with {} bytes of dynamic shared memory.\n"
_COMPUTED = "// The host computes {} = {}.\n"

# Registers behind each address that a device function is given.
_TAKEN = {
    "load_matrices_1": [1],
    "load_matrices_2": [2],
    "load_matrices_4": [4],
    "expand_pairs_4": [4],
    "multiply": [4, 4, 2],
    "multiply_two_of_four": [4, 4, 4],
}
_SUFFIX = re.compile(r"(_transposed|_b?f16|_b?f16_\d)$")

# Of shared memory, in bytes, where a source does not say what it asks for: most that there is.
_CAPACITY = 227 << 10

# Bytes: the alignment of device memory, and what lies between arrays.
_GUARD = 256
_GUARD_VALUE = 0xFF


class KernelFault(Exception):
    """A kernel did what the hardware does not define."""


@dataclass(frozen=True)
class SharedTraffic:
    """How a launch used shared memory.

    Accesses are those of the source: what a line reads twice counts twice, though a compiler would
    read it once.

    Attributes
    ----------
    wavefronts : int
        Passes over the 32 banks; every conflict adds one.
    ideal : int
        Passes if there were no conflicts.
    by_site : mapping of str to (int, int)
        Both, by line of the source.
    """

    wavefronts: int = 0
    ideal: int = 0
    by_site: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class _Launch(ctypes.Structure):
    """Mirrors emulator::Launch."""

    _fields_ = (
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int * 3),
        ("shared_bytes", ctypes.c_int),
        ("copies_are_late", ctypes.c_int),
        ("counting", ctypes.c_int),
    )


@dataclass(frozen=True)
class _Kernel:
    """A kernel of a source: its parameters as (type, name), and its text.

    `sites` are the lines that touch shared memory, by the numbers that stand in the text.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    text: str
    sites: tuple[str, ...]


def cuda_source(function: Any, target: Any = "cuda-sm80") -> str:
    """Generate the CUDA source of a PrimFunc."""
    resolved = resolve_target(target)
    host = _HostReader()
    # Only the source is wanted: TVM would compile it, once its CUDA runtime was loaded.
    with (
        resolved,
        compiled_by(lambda _source: b""),
        tvm.transform.PassContext(instruments=[host]),
    ):
        built = tvm.compile(function, resolved)
    return "".join(host.told) + str(built.mod.imports[0].inspect_source("cuda"))


@pass_instrument
class _HostReader:
    """Notes what the host computes for the kernels, and how it launches them."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def run_after_pass(self, module: Any, info: Any) -> None:
        if info.name == "tirx.SplitHostDevice":
            for function in module.functions.values():
                if "tirx.is_global_func" not in function.attrs:
                    callbacks = [(tirx.Bind, self._note_value), (tvm.ir.Call, self._note_call)]
                    tvm_ffi.structural_walk(function, callbacks)

    def _note_value(self, bind: Any) -> None:
        self.told.append(_COMPUTED.format(bind.var.name, bind.value))

    def _note_call(self, call: Any) -> None:
        if getattr(call.op, "name", "") == "tirx.call_ffi_kernel":
            names = reversed(call.attrs["launch_params"])
            given = dict(zip(names, reversed(call.args), strict=False))
            size = given.get("tirx.use_dyn_shared_memory")
            self.told.append(
                _LAUNCHED.format(call.args[0].value, size.value if size is not None else 0)
            )


def value_of(expression: str, sizes: Mapping[str, Any]) -> int:
    """Evaluate an expression of some variables that TVM printed."""
    # What TVM prints is Python, on names of its own.
    printer = SimpleNamespace(
        int32=int, int64=int, max=max, min=min, Cast=lambda _dtype, value: int(value)
    )
    return int(eval(expression, {"T": printer, **sizes}))


def emulate(
    source: str,
    arguments: Mapping[str, Any],
    grid: Sequence[int],
    block: Sequence[int],
    *,
    kernel: str | None = None,
    copies: Literal["late", "early"] = "late",
    count_conflicts: bool = False,
) -> SharedTraffic:
    """Run a kernel of a source.

    Parameters
    ----------
    source : str
        CUDA, as `cuda_source` gives it.
    arguments : mapping of str to numpy.ndarray or int
        By the names of the PrimFunc's parameters, and of the variables in their shapes; arrays are
        written in place.
    grid, block : sequence of int
        Blocks and threads along x, y and z.
    kernel : str, optional
        Which one; by default the only one. `kernel_names` lists them.
    copies : {"late", "early"}
        When asynchronous copies write: when their group is waited for, or at once.
    count_conflicts : bool
        Whether to count the accesses of shared memory.

    Raises
    ------
    KernelFault
        When the kernel reaches behind shared memory or global arrays, some lanes miss an operation
        of their warp, threads wait for others that never come, or addresses are misaligned.
    """
    library, kernels = _compiled(source)
    names = [other.name for other in kernels]
    assert kernel is not None or len(names) == 1, f"which of {names}?"
    chosen = names.index(kernel) if kernel is not None else 0
    shared = re.search(_LAUNCHED.format(names[chosen], r"(\d+)"), source)
    launch = _Launch(
        *(_extents(extents) for extents in (grid, block)),
        int(shared[1]) if shared else _CAPACITY,
        copies == "late",
        count_conflicts,
    )
    given = dict(arguments)
    for name, value in re.findall(_COMPUTED.format(r"(\w+)", "(.*)"), source):
        # What depends on something that was not given is not for this kernel.
        with suppress(NameError):
            given[name] = value_of(value, given)
    with _device_arguments(given, kernels[chosen]) as pointers:
        failed = library.emulate(chosen, ctypes.byref(launch), pointers)
    if failed:
        raise KernelFault(f"{names[chosen]}: {library.emulator_message().decode()}")
    return _traffic(library, kernels[chosen])


def kernel_names(source: str) -> list[str]:
    """Name the kernels of a source, in the order of their launches as far as it tells."""
    launched = re.findall(_LAUNCHED.format(r"(\w+)", r"\d+"), source)
    return launched or [found[1] for found in _KERNEL.finditer(source)]


def _extents(sizes: Sequence[int]) -> Any:
    return (ctypes.c_int * 3)(*sizes, *[1] * (3 - len(sizes)))


@contextmanager
def _device_arguments(arguments: Mapping[str, Any], kernel: _Kernel) -> Iterator[Any]:
    """Copy arrays to memory as a device would hold it, and back."""
    values, copied = [], []
    for _, name in kernel.parameters:
        value = arguments[name]
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            room, inside = _guarded(value)
            copied.append((name, value, room, inside))
            value = inside.ctypes.data
        values.append(ctypes.c_void_p(value))
    yield (ctypes.c_void_p * len(values))(*values)
    for name, array, room, inside in copied:
        begin = inside.ctypes.data - room.ctypes.data
        around = np.concatenate([room[:begin], room[begin + inside.size :]])
        if (around != _GUARD_VALUE).any():
            raise KernelFault(f"{kernel.name}: something was written beside the array {name}")
        if array.flags.writeable:
            _bytes_of(array)[:] = inside


def _guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copy an array's bytes to an aligned place between guards that read as NaN."""
    room = np.full(array.nbytes + 3 * _GUARD, _GUARD_VALUE, np.uint8)
    begin = _GUARD + -room.ctypes.data % _GUARD
    inside = room[begin : begin + array.nbytes]
    inside[:] = _bytes_of(array)
    return room, inside


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _traffic(library: ctypes.CDLL, kernel: _Kernel) -> SharedTraffic:
    by_site: dict[str, tuple[int, int]] = {}
    counts = (ctypes.c_long * 2)()
    for number, line in enumerate(kernel.sites):
        library.emulator_traffic(number, counts)
        before = by_site.get(line, (0, 0))
        if any(counts):
            by_site[line] = (before[0] + counts[0], before[1] + counts[1])
    wavefronts, ideal = (sum(site[i] for site in by_site.values()) for i in range(2))
    return SharedTraffic(wavefronts, ideal, by_site)


@lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[ctypes.CDLL, tuple[_Kernel, ...]]:
    kernels = tuple(_kernels(source))
    cases = "".join(
        f"static void call_{i}() {{ {_call(kernel)}; }}\n" for i, kernel in enumerate(kernels)
    )
    text = f"""#include "{HEADER}"
static void** arguments;
{"".join(kernel.text for kernel in kernels)}
{cases}
static void (*const calls[])(void) = {{{", ".join(f"call_{i}" for i in range(len(kernels)))}}};
extern "C" int emulate(int number, const emulator::Launch* launch, void** given) {{
  arguments = given;
  return emulator::run(*launch, calls[number]);
}}
"""
    with tempfile.TemporaryDirectory() as folder:
        library = _build(text, Path(folder))
    library.emulator_message.restype = ctypes.c_char_p
    return library, kernels


def _build(text: str, folder: Path) -> ctypes.CDLL:
    (folder / "kernel.cpp").write_text(text)
    command = [*_COMMAND, "-o", "kernel.so", "kernel.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(folder / "kernel.so"))


def _call(kernel: _Kernel) -> str:
    values = [
        f"({kind}){'' if kind.endswith('*') else '(intptr_t)'}arguments[{number}]"
        for number, (kind, _) in enumerate(kernel.parameters)
    ]
    return f"{kernel.name}({', '.join(values)})"


def _kernels(source: str) -> Iterator[_Kernel]:
    """Cut a source into its kernels: the emulator has its own meaning of what comes before."""
    found = list(_KERNEL.finditer(source))
    ends = [following.start() for following in found[1:]] + [len(source)]
    sites: list[str] = []
    for start, end in zip(found, ends, strict=True):
        line = source.count("\n", 0, start.start()) + 1
        _check_registers(source[start.start() : end])
        body = _on_shared_memory(source[start.start() : end], sites)
        body = re.sub(r"\bsparse_wait_for_copies_(\d+)\(\)", r"emulator::wait_for_copies(\1)", body)
        parameters = tuple(_parameter(part) for part in start[2].split(","))
        yield _Kernel(start[1], parameters, f'#line {line} "kernel.cu"\n{body}', tuple(sites))


def _check_registers(body: str) -> None:
    """Refuse arrays shorter than what device functions take: TVM shrinks those not kept whole."""
    lengths = {
        name: int(size) for name, size in re.findall(r"(?:uint|float) (\w+)\[(\d+)\];", body)
    }
    for name, arguments in re.findall(r"\bsparse_(\w+)\((.*)\);", body):
        taken = _TAKEN.get(_SUFFIX.sub("", name), [])
        given = re.findall(r"&\((\w+)\[(\d+)\]\)", arguments)[: len(taken)]
        for (array, first), count in zip(given, taken, strict=True):
            if int(first) + count > lengths[array]:
                raise KernelFault(f"{name} is given an address near the end of an array")


def _parameter(declared: str) -> tuple[str, str]:
    """Return a parameter's type, and its name in the PrimFunc."""
    kind, name = declared.replace("__restrict__", "").rsplit(maxsplit=1)
    return kind.strip(), name.removesuffix("_ptr")


def _on_shared_memory(body: str, sites: list[str]) -> str:
    """Replace pointers into shared memory by the emulator's; append where they stand to `sites`."""
    declared = _SHARED.search(body)
    assert body.count("__shared__") == (declared is not None), "static shared memory"
    if declared is None:
        return body
    element, name = declared.groups()

    def replaced(found: re.Match[str]) -> str:
        # TVM begins a line with what it stores to.
        kind = "Reading" if found["start"] is None and not found["address"] else "Writing"
        end = body.find("\n", found.end())
        sites.append(body[body.rfind("\n", 0, found.end()) + 1 : end].strip())
        pointer = f"emulator::{kind}<{found['cast'] or element}>({len(sites) - 1})"
        if found["vector"]:
            pointer = f"*emulator::{kind}<{found['wide']}>({pointer}"
        return f"{found['start'] or ''}{found['address'] or ''}{pointer}"

    body = body.replace(declared[0], "")
    pattern = (
        r"(?P<start>^ *)?(?P<vector>\*\((?P<wide>[\w ]+)\*\)\()?(?P<address>&\()?"
        rf"(?:\(\((?P<cast>[\w ]+)\*\){name}\)|\b{name}\b)"
    )
    return re.sub(pattern, replaced, body, flags=re.MULTILINE)
