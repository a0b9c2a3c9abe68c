"""Run the CUDA source that TVM generates on this machine's processor, threads as fibres.

The source is compiled by g++ against `emulator.hpp`. It shows wrong indices, missing barriers and
unwritten shared memory as wrong numbers; it says nothing about time.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from tvm_sparse.cuda_toolkit import compiled_by
from tvm_sparse.targets import resolve_target

HEADER = Path(__file__).with_name("emulator.hpp")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# What the compiler sees in the place of dynamic shared memory.
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) uchar (\w+)\[\];")


def cuda_source(function: Any, target: Any = "cuda-sm80") -> str:
    """Generate the CUDA source of a PrimFunc."""
    resolved = resolve_target(target)
    # Only the source is wanted: TVM would compile it, once its CUDA runtime was loaded.
    with resolved, compiled_by(lambda _source: b""):
        built = tvm.compile(function, resolved)
    return str(built.mod.imports[0].inspect_source("cuda"))


def emulate(
    source: str, arguments: Mapping[str, Any], grid: Sequence[int], block: Sequence[int]
) -> None:
    """Run the only kernel of a source.

    Parameters
    ----------
    source : str
        CUDA, as `cuda_source` gives it.
    arguments : mapping of str to numpy.ndarray or int
        By the names of the PrimFunc's parameters; arrays are written in place.
    grid, block : sequence of int
        Blocks and threads along x, y and z.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = _compile(source, Path(folder))
        names = _parameters(source)
        values: list[Any] = []
        for name in names:
            value = arguments[name]
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous
                values.append(ctypes.c_void_p(value.ctypes.data))
            else:
                values.append(ctypes.c_void_p(value))
        pointers = (ctypes.c_void_p * len(values))(*values)
        sizes = [(ctypes.c_int * 3)(*size, *[1] * (3 - len(size))) for size in (grid, block)]
        library.emulate(*sizes, pointers)


def _kernel(source: str) -> re.Match[str]:
    found = re.search(
        r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) \{', source
    )
    assert found is not None
    return found


def _parameters(source: str) -> list[str]:
    """Name the kernel's parameters, as the PrimFunc does."""
    declared = [part.split()[-1] for part in _kernel(source).group(2).split(",")]
    return [name.removesuffix("_ptr") for name in declared]


def _compile(source: str, folder: Path) -> ctypes.CDLL:
    kernel = _kernel(source)
    kinds = [
        re.sub(r"\s*(__restrict__)?\s*\w+$", "", p.strip()) for p in kernel.group(2).split(",")
    ]
    body = _SHARED.sub(r"uchar* \1 = emulator::shared_memory;", source[kernel.start() :])
    arguments = ", ".join(_read(kind, i) for i, kind in enumerate(kinds))
    text = f"""#include "{HEADER}"
{body}
static void** arguments;
static void call() {{ {kernel.group(1)}({arguments}); }}
extern "C" void emulate(const int* grid, const int* block, void** given) {{
  arguments = given;
  emulator::run(grid, block, call);
}}
"""
    (folder / "kernel.cpp").write_text(text)
    command = [
        "g++",
        "-O1",
        "-w",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-o",
        "kernel.so",
        "kernel.cpp",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(folder / "kernel.so"))


def _read(kind: str, number: int) -> str:
    if kind.endswith("*"):
        return f"({kind})arguments[{number}]"
    return f"({kind})(intptr_t)arguments[{number}]"
