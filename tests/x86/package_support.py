"""Packages, and clean places to run them in."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "deploy" / "cpp"

# What a package in Python may use, with what apache-tvm-ffi itself needs.
_ALLOWED = ("numpy", "numpy.libs", "tvm_ffi", "typing_extensions.py")


def clean_python(folder: Path) -> Path:
    """Make a virtual environment that sees NumPy and apache-tvm-ffi alone; return its Python."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    site = Path(done.stdout.strip())
    here = Path(sysconfig.get_path("purelib"))
    for name in _ALLOWED:
        source = here / name
        if not source.exists():
            spec = importlib.util.find_spec(name.removesuffix(".py"))
            if spec is None or spec.origin is None:
                continue  # numpy.libs, where NumPy was built here
            found = Path(spec.origin)
            source = found if name.endswith(".py") else found.parent
        (site / name).symlink_to(source)
    return python


def run_clean(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in an empty environment, but for where programs and temporary files are."""
    environment = {"PATH": os.defpath, "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def compiler() -> str:
    """Name the C++ compiler; without one, the test is skipped."""
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build_example(package: Path, folder: Path) -> Path:
    """Build the example of a package with nothing but its folder: by CMake where that is there."""
    cxx, sources, cmake = compiler(), package / "cpp", shutil.which("cmake")
    build = folder / "build"
    if cmake and shutil.which("make"):
        commands: list[list[str | Path]] = [
            [cmake, "-S", sources, "-B", build, f"-DCMAKE_CXX_COMPILER={cxx}"],
            [cmake, "--build", build],
        ]
    else:
        build.mkdir()
        headers = ["-I", sources, "-isystem", sources / "include"]
        libraries = ["-ldl", "-pthread"]
        source, program = sources / "example.cpp", build / "example"
        commands = [[cxx, "-std=c++17", "-O2", *headers, source, "-o", program, *libraries]]
    for command in commands:
        done = run_clean(command, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr
    return build / "example"


def sanitizers(folder: Path) -> list[str]:
    """Return the options for a build that stops at undefined behaviour, where the compiler can."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    done = run_clean([compiler(), *options, probe, "-o", folder / "probe"], folder)
    works = done.returncode == 0 and run_clean([folder / "probe"], folder).returncode == 0
    return options if works else []
