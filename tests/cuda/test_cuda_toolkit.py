"""Where NVIDIA's compiler is looked for, and what is said where there is none."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from tvm_sparse.cuda_toolkit import compile_source, find_nvcc, machine_code
from tvm_sparse.errors import TargetError

SOURCE = "#include <cuda_fp16.h>\n" + (
    'extern "C" __global__ void f(half* x) { x[threadIdx.x] = __float2half(1.0f); }'
)


@pytest.fixture
def no_toolkit(monkeypatch, tmp_path):
    """Hide the toolkit, but not g++."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for tool in ("g++", "gcc", "cc", "as", "ld", "sh", "cpp"):
        for folder in ("/usr/bin", "/bin", "/usr/local/bin"):
            if (Path(folder) / tool).exists() and not (tmp_path / tool).exists():
                (tmp_path / tool).symlink_to(Path(folder) / tool)
    monkeypatch.setenv("PATH", str(tmp_path))


def pretend_packages(monkeypatch, folder):
    """Have NVIDIA's packages for pip be in a folder."""
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(folder)] if folder else []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_without_a_compiler_both_ways_to_get_one_are_named(no_toolkit, monkeypatch):
    pretend_packages(monkeypatch, None)
    assert find_nvcc() is None
    with pytest.raises(TargetError, match=r"CUDA 13 toolkit.*pip install tvm-sparse\[cuda\]"):
        with machine_code("sm_80"):
            pass


def test_a_toolkit_is_found_by_its_variable(no_toolkit, monkeypatch, tmp_path):
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "toolkit" / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    assert find_nvcc() == str(tmp_path / "toolkit" / "bin" / "nvcc")


def test_the_compiler_of_pip_is_found(no_toolkit, monkeypatch, tmp_path):
    (tmp_path / "nvidia" / "cu13" / "bin").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "bin" / "nvcc").touch()
    pretend_packages(monkeypatch, tmp_path / "nvidia")
    assert find_nvcc() == str(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc")


def test_the_compiler_of_pip_makes_machine_code(no_toolkit):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("NVIDIA's packages are not installed: pip install 'tvm-sparse[cuda]'")
    assert compile_source(nvcc, SOURCE, "sm_90a")
