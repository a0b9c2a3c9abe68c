"""An exported library describes itself, loads on the runtime alone, and is refused in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deploy_support import (
    assert_pair,
    chain_module,
    pair_executable,
    pair_inputs,
    pair_manifest,
    pair_module,
)

from tvm_sparse.deploy import export, load_module, wrap_executable
from tvm_sparse.errors import LibraryError, TargetError
from tvm_sparse.manifest import read_manifest


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.so"
    pair_module(digest="abc").export(path)
    return path


def test_a_library_gives_its_manifest_without_being_loaded(library: Path) -> None:
    assert read_manifest(library) == pair_manifest(digest="abc")


def test_a_loaded_library_computes_what_the_fresh_module_does(library: Path) -> None:
    x, z = pair_inputs()
    loaded = load_module(library)
    for got, want in zip(loaded(x, z), pair_module()(x, z), strict=True):
        np.testing.assert_array_equal(got, want)
    assert loaded.manifest == pair_manifest(digest="abc")


def test_a_library_that_took_anothers_place_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    x = np.ones((4, 8), np.float32)
    pair_module().export(path)
    first = load_module(path)
    chain_module().export(path)
    second = load_module(path)
    np.testing.assert_array_equal(second(x), chain_module()(x))
    assert_pair(first(*pair_inputs()), *pair_inputs())
    again = load_module(path)
    np.testing.assert_array_equal(again(x), second(x))


RUN_ALONE = """
import sys
import numpy as np
from tvm_sparse.deploy import load_module
module = load_module(sys.argv[1], threads=2)
x, z = np.ones((3, 8), "f4"), np.ones((3, 5), "f4")
first = module(x, z)
assert module.profile(x, z, repeats=2).layers.keys() == {"fc"}
assert "tvm" not in sys.modules
import os, tvm_ffi
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
with module._machines.lent() as machine:
    threads = machine._team.run(tvm_ffi.get_global_func("runtime.NumThreads"))
assert threads == min(2, cores)
if len(sys.argv) > 2:
    import tvm
    from tvm import relax
    machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
    same = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(z))
    np.testing.assert_array_equal(same[0].numpy(), first[0])
    np.testing.assert_array_equal(module(x, z)[0], first[0])
"""


@pytest.mark.parametrize("then", [[], ["import tvm"]], ids=["alone", "tvm imported afterwards"])
def test_loading_and_running_needs_no_tvm_package(library: Path, then: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RUN_ALONE, str(library), *then]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("strip") is None, reason="binutils are not installed")
@pytest.mark.parametrize("option", ["--strip-all", "--strip-unneeded"])
def test_a_stripped_library_still_works(library: Path, tmp_path: Path, option: str) -> None:
    stripped = tmp_path / "stripped.so"
    subprocess.run(["strip", option, "-o", str(stripped), str(library)], check=True)
    x, z = pair_inputs()
    assert_pair(load_module(stripped)(x, z), x, z)


def test_the_manifest_survives_section_garbage_collection(tmp_path: Path) -> None:
    linker = tmp_path / "collecting-cc"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    options = "-O2 -ffunction-sections -fdata-sections -Wl,--gc-sections"
    linker.write_text(f'#!/bin/sh\nexec {compiler} {options} "$@"\n')
    linker.chmod(0o755)
    export(pair_executable(), pair_manifest(), tmp_path / "model.so", cc=str(linker))
    x, z = pair_inputs()
    assert_pair(load_module(tmp_path / "model.so")(x, z), x, z)


def test_a_large_manifest_is_exported(tmp_path: Path) -> None:
    plan = {f"layer.{i}": 'the reason is 90 % zeros?? \\ "' * 10 for i in range(2000)}
    wrap_executable(pair_executable(), pair_manifest(plan=plan)).export(tmp_path / "model.so")
    assert read_manifest(tmp_path / "model.so").plan == plan


def test_a_loaded_module_exports_by_copying(library: Path, tmp_path: Path) -> None:
    loaded = load_module(library)
    loaded.export(tmp_path / "copy.so")
    assert (tmp_path / "copy.so").read_bytes() == library.read_bytes()
    loaded.export(library)
    x, z = pair_inputs()
    assert_pair(load_module(library)(x, z), x, z)


def test_a_bare_file_name_is_the_file_in_this_folder(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(library.parent)
    x, z = pair_inputs()
    assert_pair(load_module("model.so")(x, z), x, z)


def test_exporting_replaces_an_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_text("older")
    pair_module().export(path)
    assert read_manifest(path) == pair_manifest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.so"]


def test_a_failed_export_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_text("older")
    linker = tmp_path / "broken-cc"
    linker.write_text("#!/bin/sh\necho 'ld: error: no space' >&2\nexit 1\n")
    linker.chmod(0o755)
    with pytest.raises(LibraryError, match="the linker said: ld: error: no space"):
        export(pair_executable(), pair_manifest(), path, cc=str(linker))
    assert path.read_text() == "older"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["broken-cc", "model.so"]


def test_exporting_and_loading_say_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair_module().export(tmp_path / "model.so")
    load_module(tmp_path / "model.so")
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == ""


def test_what_a_linker_warns_of_is_passed_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Executable:
        def export_library(self, path: str, **_: object) -> None:
            Path(path).touch()
            os.write(2, b"[1] executable.cc:1: Warning: Scope Saving:\nsomething else\n")

    export(Executable(), pair_manifest(), tmp_path / "model.so")
    assert capfd.readouterr().err == "something else\n"


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="'no-such-cc' was not found; install"):
        export(pair_executable(), pair_manifest(), tmp_path / "model.so", cc="no-such-cc")


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"cannot write '.*model\.so': No such file"):
        pair_module().export(tmp_path / "nowhere" / "model.so")


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="it is a folder"):
        pair_module().export(tmp_path)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"cannot read '.*model\.so': No such file"):
        load_module(tmp_path / "model.so")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x08\x07onnx" * 100])
def test_a_file_that_is_no_library_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(data)
    with pytest.raises(LibraryError, match="is not a shared library"):
        load_module(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_library_is_refused_before_it_is_mapped(
    library: Path, tmp_path: Path, share: float
) -> None:
    data = library.read_bytes()
    path = tmp_path / "model.so"
    path.write_bytes(data[: max(int(len(data) * share), 10)])
    with pytest.raises(LibraryError, match="is truncated: "):
        load_module(path)


def test_a_library_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.so"
    pair_executable().export_library(str(path))
    with pytest.raises(LibraryError, match="tvm_sparse did not export it"):
        load_module(path)


def test_another_kind_of_elf_file_is_refused(library: Path, tmp_path: Path) -> None:
    data = bytearray(library.read_bytes())
    data[16] = 1
    (tmp_path / "model.o").write_bytes(data)
    with pytest.raises(LibraryError, match="another kind of ELF file"):
        load_module(tmp_path / "model.o")


def test_a_library_for_another_processor_is_refused(library: Path, tmp_path: Path) -> None:
    data = bytearray(library.read_bytes())
    data[18] = 0xF3
    (tmp_path / "model.so").write_bytes(data)
    with pytest.raises(TargetError, match="is for riscv64 processors, and this machine is"):
        load_module(tmp_path / "model.so")


def test_lacking_instructions_are_named_instead_of_crashing(tmp_path: Path) -> None:
    needing = pair_manifest(cpu_features=("sse4.2", "avx512f", "quantum9"))
    path = tmp_path / "model.so"
    export(pair_executable(), needing, path)
    with pytest.raises(TargetError, match=r"model\.so' needs .* lacks: .*quantum9"):
        load_module(path)


def test_a_module_for_a_better_machine_is_exported_and_not_run(tmp_path: Path) -> None:
    needing = pair_manifest(cpu_features=("quantum9",))
    module = wrap_executable(pair_executable(), needing)
    with pytest.raises(TargetError, match=r"the module needs .* lacks: quantum9; compile for"):
        module(*pair_inputs())
    module.export(tmp_path / "model.so")
    assert read_manifest(tmp_path / "model.so") == needing


def test_two_libraries_live_side_by_side(library: Path, tmp_path: Path) -> None:
    from deploy_support import passing_module

    passing_module().export(tmp_path / "model.so")
    first, second = load_module(library), load_module(tmp_path / "model.so")
    x, z = pair_inputs()
    assert_pair(first(x, z), x, z)
    np.testing.assert_array_equal(
        second(np.ones(4, np.float32), np.array([True, True]))[1], [0, 1, 2]
    )
    assert_pair(first(x, z), x, z)
