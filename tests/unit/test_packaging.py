"""The mapped folders, the wheel and the runner: the traps of this layout, each with its guard."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import tvm_sparse

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = ("deploy", "passes", "schedules")
WHEEL = os.environ.get("TVM_SPARSE_WHEEL")


def folder_of(package: str) -> Path:
    """Where pyproject.toml says that a package lives."""
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        mapped = SETUPTOOLS["package-dir"].get(".".join(parts[:length]))
        if mapped is not None:
            return ROOT.joinpath(mapped, *parts[length:])
    raise AssertionError(f"{package} stands in no mapped folder")


def folders_with_code() -> set[Path]:
    tops = [ROOT / "tvm_sparse", *(ROOT / name for name in MAPPED)]
    return {path.parent for top in tops for path in top.rglob("*.py")}


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    missing = sorted(str(path.relative_to(ROOT)) for path in folders_with_code() - listed)
    assert not missing, f"add to [tool.setuptools] packages in pyproject.toml: {missing}"


def test_every_listed_package_has_a_folder_with_an_init() -> None:
    for package in SETUPTOOLS["packages"]:
        assert (folder_of(package) / "__init__.py").is_file(), package


@pytest.mark.parametrize("name", MAPPED)
def test_a_mapped_folder_is_no_package_of_its_own(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert f"import tvm_sparse.{name}" in result.stderr


def test_no_conftest_at_the_root_shadows_the_installed_package() -> None:
    assert not (ROOT / "conftest.py").exists()


def test_tests_are_no_package_as_that_would_put_the_root_on_the_path() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_names_of_test_files_are_unique_as_they_are_modules_without_a_package() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(set(names)) == sorted(names)


def test_what_is_not_python_is_shipped() -> None:
    assert SETUPTOOLS["package-data"]["tvm_sparse"] == ["py.typed", "weights.c"]
    for name in SETUPTOOLS["package-data"]["tvm_sparse"]:
        assert (Path(tvm_sparse.__file__).parent / name).is_file()


def test_the_sources_for_cpp_are_shipped() -> None:
    shipped = Path(importlib.import_module("tvm_sparse.deployment").__path__[0]) / "cpp"
    names = {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
    assert names == {
        path.relative_to(ROOT / "deploy" / "cpp")
        for path in (ROOT / "deploy" / "cpp").rglob("*")
        if path.is_file()
    }
    assert Path("example.cpp") in names and Path("tvm_sparse/model.hpp") in names


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_is_importable_as_installed(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    if WHEEL is not None:
        assert Path(module.__file__).is_relative_to(Path(WHEEL).resolve())


@pytest.mark.skipif(WHEEL is None, reason="only `make wheel-job` runs on the wheel")
def test_the_wheel_holds_every_module() -> None:
    for package in SETUPTOOLS["packages"]:
        installed = Path(importlib.import_module(package).__path__[0])
        assert {path.name for path in installed.glob("*.py")} == {
            path.name for path in folder_of(package).glob("*.py")
        }, package


def test_the_version_is_stated_once_and_the_same_everywhere() -> None:
    assert tvm_sparse.__version__ == PROJECT["project"]["version"]
    assert importlib.metadata.version("tvm-sparse") == tvm_sparse.__version__
    assert f"## {tvm_sparse.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_pin_without_which_tvm_crashes_is_there() -> None:
    assert "apache-tvm-ffi==0.1.14.post1" in PROJECT["project"]["dependencies"]


def test_tvm_finds_the_plug_in_by_its_entry_point() -> None:
    found = importlib.metadata.entry_points(group="tvm.backends")
    assert "tvm_sparse:_autoload" in {entry.value for entry in found}


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("import pytest\n\n@pytest.mark.skip\ndef test_a(): pass\n", 1, True),
        (
            "import pytest\n\n@pytest.mark.skip\ndef test_a(): pass\n\ndef test_b(): pass\n",
            0,
            False,
        ),
        ("def test_a(): assert False\n", 1, False),
        ("", 5, False),
    ],
    ids=["all skipped", "some skipped", "failed", "none"],
)
def test_a_run_in_which_nothing_passed_fails(
    tmp_path: Path, body: str, code: int, says: bool, workers: list[str]
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(body)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert ("no test passed" in result.stdout) == says
