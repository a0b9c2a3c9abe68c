"""Machine code for GPUs, on machines that need not have one.

TVM turns CUDA source into machine code only where its CUDA runtime could be loaded, and that needs
the driver's library, which machines without a GPU lack. A stub of that library, whose functions all
fail, is enough to load it; nothing is ever launched through it. What nvcc makes then lies in the
exported library: a fat binary with code for the target's architecture, and PTX for later ones.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import TargetError

# What TVM's CUDA runtime takes from the driver. Each says "no device" (CUDA_ERROR_NO_DEVICE).
_DRIVER = "libcuda.so.1"
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
_NO_DEVICE = 100
# Attributes of a device: the major and the minor number of its compute capability.
_CAPABILITY = (75, 76)
_CALLBACK = "tvm_callback_cuda_compile"
_TIMEOUT_SECONDS = 600

# Kept for the life of the process: a library that was unloaded takes TVM's functions with it.
_loaded: list[Any] = []


def find_nvcc() -> str | None:
    """Return the path of NVIDIA's compiler, of a toolkit or of pip's; None where there is none."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        candidate = Path(os.environ.get(variable, "")) / "bin" / "nvcc"
        if os.environ.get(variable) and candidate.is_file():
            return str(candidate)
    return shutil.which("nvcc") or next(_in_pip_packages("bin/nvcc"), None)


def has_gpu() -> bool:
    """Whether NVIDIA's driver is here and has a device."""
    try:
        driver = ctypes.CDLL(_DRIVER)
        count = ctypes.c_int(0)
        return bool(
            driver.cuInit(0) == 0
            and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
            and count.value
        )
    except (OSError, AttributeError):
        return False


def gpu_here() -> tuple[str, int] | None:
    """Return the first GPU's name and its compute capability as one number, 90 for 9.0."""
    if not has_gpu():
        return None
    driver = ctypes.CDLL(_DRIVER)
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    failed = driver.cuDeviceGet(ctypes.byref(device), 0)
    failed |= driver.cuDeviceGetName(name, len(name), device)
    for number, attribute in zip(numbers, _CAPABILITY, strict=True):
        failed |= driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if failed:
        return None
    return name.value.decode(), 10 * numbers[0].value + numbers[1].value


def runs_on(arch: str, capability: int) -> bool:
    """Whether a GPU runs code for an architecture: exactly its own where that ends in a letter."""
    number = arch.removeprefix("sm_")
    if number.isdigit():
        return capability >= int(number)
    return capability == int(number[:-1])


@contextmanager
def machine_code(arch: str) -> Iterator[None]:
    """Have TVM generate machine code for an architecture while the block runs.

    Raises
    ------
    TargetError
        When nvcc is not installed, or TVM's CUDA runtime cannot be loaded.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise TargetError(
            "CUDA code needs NVIDIA's compiler: install the CUDA 13 toolkit, so that nvcc is "
            "found, or 'pip install tvm-sparse[cuda]' and g++"
        )
    load_cuda_runtime()
    with compiled_by(lambda source: compile_source(nvcc, source, arch)):
        yield


@contextmanager
def compiled_by(compiler: Callable[[str], bytes]) -> Iterator[None]:
    """Have TVM's CUDA source compiled by a function while the block runs."""
    import tvm_ffi

    before = tvm_ffi.get_global_func(_CALLBACK)
    tvm_ffi.register_global_func(_CALLBACK, compiler, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def compile_source(nvcc: str, source: str, arch: str) -> bytes:
    """Compile CUDA source to a fat binary: code for `arch`, and PTX.

    Raises
    ------
    TargetError
        With the compiler's first complaint.
    """
    number = arch.removeprefix("sm_")
    codes = f"arch=compute_{number},code=[sm_{number},compute_{number}]"
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-cuda-") as name:
        folder = Path(name)
        (folder / "kernels.cu").write_text(source)
        # No --use_fast_math, which TVM would ask for: its exponentials are off by more than errors
        # are allowed to be.
        command = [nvcc, "-O3", "-std=c++17", "-w", "--fatbin", "-gencode", codes]
        done = subprocess.run(
            [*command, "-o", "kernels.fatbin", "kernels.cu"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
            raise TargetError(f"nvcc cannot compile for {arch}: {lines[0]}")
        return (folder / "kernels.fatbin").read_bytes()


def load_cuda_runtime() -> None:
    """Load TVM's CUDA runtime, over a stub of the driver where the driver is missing.

    TVM's own runtime has to be loaded before.

    Raises
    ------
    TargetError
        When TVM was built without it, or the CUDA runtime library is missing.
    """
    import tvm_ffi

    if _loaded or tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return
    runtime = find_cuda_runtime()
    try:
        ctypes.CDLL(_DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        _loaded.append(_stub_driver())
    load_cuda_library(runtime)


def load_cuda_library(runtime: Path) -> None:
    """Load TVM's CUDA runtime from its file; the driver, or a stub of it, is loaded by its name.

    Raises
    ------
    TargetError
        When the CUDA runtime library of NVIDIA is missing.
    """
    for library in _cudart_candidates():
        try:
            _loaded.append(ctypes.CDLL(library, ctypes.RTLD_GLOBAL))
            break
        except OSError:
            continue
    try:
        _loaded.append(ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise TargetError(
            f"TVM's CUDA runtime cannot be loaded: {error}; install the CUDA 13 toolkit, or "
            "'pip install nvidia-cuda-runtime'"
        ) from None


def find_cuda_runtime() -> Path:
    """Find TVM's CUDA runtime.

    Raises
    ------
    TargetError
        When TVM was built without it.
    """
    # As for the runtime itself: a machine that only runs models may have the libraries alone.
    folders = [Path(os.environ["TVM_LIBRARY_PATH"])] if os.environ.get("TVM_LIBRARY_PATH") else []
    spec = importlib.util.find_spec("tvm")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folders += [Path(location) / "lib", Path(location)]
    for folder in folders:
        if (folder / "libtvm_runtime_cuda.so").is_file():
            return folder / "libtvm_runtime_cuda.so"
    raise TargetError("this TVM was built without CUDA; the wheel apache-tvm for Linux has it")


def _cudart_candidates() -> Iterator[str]:
    """Name the CUDA runtime library where the system, pip or a toolkit puts it."""
    yield "libcudart.so.13"
    yield from _in_pip_packages("lib/libcudart.so.13")
    nvcc = find_nvcc()
    if nvcc is not None:
        root = Path(nvcc).resolve().parents[1]
        yield from map(str, sorted(root.glob("lib*/libcudart.so.13")))


def _in_pip_packages(path: str) -> Iterator[str]:
    """Find a file in NVIDIA's packages for pip, which share a folder."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        yield from map(str, sorted(Path(location).glob(f"*/{path}")))


def _stub_driver() -> ctypes.CDLL:
    """Build and load a library with the driver's name, whose functions all fail.

    Raises
    ------
    TargetError
        When there is no C compiler.
    """
    from tvm.support import cc

    compiler = cc.get_cc()
    if compiler is None or shutil.which(compiler) is None:
        raise TargetError(
            "compiling for a GPU that this machine lacks needs a C compiler; install gcc or clang"
        )
    text = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_FUNCTIONS)
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-driver-") as name:
        source, library = Path(name) / "driver.c", Path(name) / _DRIVER
        source.write_text(text)
        command = [compiler, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}"]
        subprocess.run(
            [*command, "-o", str(library), str(source)], check=True, timeout=_TIMEOUT_SECONDS
        )
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
