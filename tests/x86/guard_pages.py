"""Arrays between two inaccessible pages, and child processes that may die of touching them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

Place = Literal["front", "rear"]
PLACES: tuple[Place, ...] = ("front", "rear")

# What TVM demands of the start of a tensor.
_ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0

# Bytes around an array: NaN as float32, and as an index far outside of everything.
_POISON = 0xFF

_replacements: list[ctypes.CDLL] = []  # stay loaded as long as kernels may call them

_CHILD = """
import importlib, os, sys
# tvm_ffi imports PyTorch where it is installed: seconds, for nothing that is needed here.
sys.modules["torch"] = None
sys.path[:0] = sys.argv[1].split(os.pathsep)
getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])
"""


class GuardedArray:
    """A copy of an array, aligned to 64 bytes, with an inaccessible page on either side.

    Parameters
    ----------
    array : numpy.ndarray
        What to copy.
    place : str
        "front" starts right behind the first page; "rear" ends at the last one, or up to 63 bytes
        before it where the size is no multiple of the alignment.

    Attributes
    ----------
    array : numpy.ndarray
        The copy; gone as soon as the GuardedArray is.
    """

    def __init__(self, array: np.ndarray, place: Place) -> None:
        rounded = -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        inner = max(-(-rounded // _PAGE), 1) * _PAGE
        self._memory = mmap.mmap(-1, inner + 2 * _PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._bytes = _view(first + _PAGE, (inner,), np.dtype(np.uint8))
        self._bytes[:] = _POISON
        self._start = 0 if place == "front" else inner - rounded
        self._end = self._start + array.nbytes
        self.array = _view(first + _PAGE + self._start, array.shape, array.dtype)
        self.array[...] = array
        for page in (first, first + _PAGE + inner):
            if _libc().mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def surroundings_are_intact(self) -> bool:
        """Whether nobody wrote between the array and the inaccessible pages."""
        before, behind = self._bytes[: self._start], self._bytes[self._end :]
        return bool(np.all(before == _POISON) and np.all(behind == _POISON))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return np.ndarray(shape, dtype, buffer=memory)


def run_in_child(module: str, function: str, *arguments: object) -> tuple[str, list[str]]:
    """Call a function of a module in this folder in a process of its own.

    Returns
    -------
    ending : str
        Empty when it returned; else the signal that killed it, or its traceback.
    lines : list of str
        What it printed.
    """
    here = Path(__file__).parent
    folder = os.pathsep.join(map(str, (here, here.parent)))
    command = [sys.executable, "-c", _CHILD, folder, module, function, *map(str, arguments)]
    environment = {**os.environ, "TVM_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    ending = done.stderr if done.returncode > 0 else ""
    if done.returncode < 0:
        ending = signal.Signals(-done.returncode).name
    return ending, done.stdout.splitlines()


def build_scratch_guard(folder: Path) -> Path | None:
    """Compile what `guard_scratch` loads; None where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    library = folder / "guarded_scratch.so"
    source = Path(__file__).with_name("guarded_scratch.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def guard_scratch(library: str) -> None:
    """Put inaccessible pages around the scratch memory of kernels that are loaded from now on.

    TVM hands every library the addresses of the runtime's functions; those registered last win.
    """
    import tvm_ffi

    replacement = ctypes.CDLL(library)
    register = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi()).TVMFFIEnvModRegisterContextSymbol
    for name in ("TVMBackendAllocWorkspace", "TVMBackendFreeWorkspace"):
        function = ctypes.cast(getattr(replacement, name), ctypes.c_void_p)
        if register(f"__{name}".encode(), function):
            raise RuntimeError(f"{name} was not registered")
    _replacements.append(replacement)
