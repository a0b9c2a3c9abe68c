"""A package is one folder that runs elsewhere: from Python without TVM, and from C++."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deploy_support import (
    assert_pair,
    build,
    large_input,
    large_module,
    large_output,
    manifest,
    pair_executable,
    pair_inputs,
    pair_manifest,
    pair_module,
    passing_module,
)
from package_support import build_example, clean_python, run_clean

import tvm_sparse as ts
from tvm_sparse.cli import main
from tvm_sparse.deploy import export, wrap_executable
from tvm_sparse.errors import LibraryError, TargetError
from tvm_sparse.model import TensorSpec
from tvm_sparse.package_manifest import MANIFEST, read_package_manifest, sha256_of
from tvm_sparse.packaged import load

MODULES = {"pair": pair_module, "large": large_module, "passing": passing_module}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each module, moved after it was made."""
    made = tmp_path_factory.mktemp("made")
    moved = tmp_path_factory.mktemp("moved") / "two words"
    for name, module in MODULES.items():
        module().export(made / f"{name}.so")
        ts.package(made / f"{name}.so", made / name, cpp=name == "pair")
    shutil.move(made, moved)
    return {name: moved / name for name in MODULES}


@pytest.fixture
def package(packages: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one package, to be damaged."""
    return Path(shutil.copytree(packages["pair"], tmp_path / "package"))


def inputs_of(name: str) -> dict[str, np.ndarray]:
    if name == "pair":
        return dict(zip(("x", "z/0"), pair_inputs(), strict=True))
    if name == "large":
        return {"x": large_input()}
    return {"x": np.arange(4, dtype=np.float32), "flag": np.array([True, False])}


# --- what is in the folder --------------------------------------------------------------------


def test_the_folder_holds_the_library_the_runtime_and_a_manifest(packages: dict[str, Path]) -> None:
    names = {path.name for path in packages["large"].iterdir()}
    libraries = {"model.so", "libtvm_ffi.so", "libtvm_runtime.so"}
    assert names == {*libraries, MANIFEST, "load.py", "README.md", "licences"}
    runtime = sum((packages["large"] / name).stat().st_size for name in libraries - {"model.so"})
    assert runtime < 7 << 20
    for name in ("apache-tvm", "apache-tvm-ffi", "tvm-sparse"):
        assert (packages["large"] / "licences" / name / "LICENSE").is_file()


def test_the_manifest_lists_every_file_with_its_hash(packages: dict[str, Path]) -> None:
    for folder in packages.values():
        found = read_package_manifest(folder / MANIFEST)
        files = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert set(files) == {*found.files, MANIFEST}
        for name, entry in found.files.items():
            data = files[name].read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)


def test_the_manifest_says_what_the_model_takes_and_needs(packages: dict[str, Path]) -> None:
    data = json.loads((packages["pair"] / MANIFEST).read_text())
    assert data["model"]["inputs"][1] == {"name": "z/0", "shape": ["batch", 5], "dtype": "float32"}
    assert [output["name"] for output in data["model"]["outputs"]] == ["y", "twice"]
    assert data["model"]["target"] == {"kind": "llvm", "mcpu": "x86-64-v2"}
    assert data["model"]["threads"] == 1
    assert data["cpu_flags"] == {"sse4.2": "sse4_2"}
    assert data["versions"].keys() == {"tvm-sparse", "apache-tvm", "apache-tvm-ffi"}


def test_a_module_is_packaged_without_a_library_between(tmp_path: Path) -> None:
    ts.package(large_module(), tmp_path / "dist")
    x = large_input()
    np.testing.assert_array_equal(ts.load_module(tmp_path / "dist")(x), large_output(x))


def test_the_runtime_that_sorts_comes_along_where_it_is_needed(tmp_path: Path) -> None:
    from tvm import relax

    def function(bb: object) -> None:
        x = relax.Var("x", relax.TensorType((3, 8), "float32"))
        with bb.function("main", [x]):
            with bb.dataflow():
                top = bb.emit(relax.op.topk(x, k=2, axis=-1))
                out = bb.emit_output(bb.emit(relax.TupleGetItem(top, 0)))
            bb.emit_func_output(out)

    specs = TensorSpec("x", (3, 8), "float32"), TensorSpec("y", (3, 2), "float32")
    module = wrap_executable(build(function), manifest((specs[0],), (specs[1],)))
    ts.package(module, tmp_path / "dist")
    assert (tmp_path / "dist" / "libtvm_runtime_extra.so").is_file()
    x = np.random.default_rng(0).permutation(24).astype(np.float32).reshape(3, 8)
    np.save(tmp_path / "x.npy", x)
    script = "import numpy, load; print(load.load().run({'x': numpy.load('x.npy')})['y'].tolist())"
    shutil.copy(tmp_path / "x.npy", tmp_path / "dist" / "x.npy")
    done = run_clean([clean_python(tmp_path), "-c", script], tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == np.sort(x, axis=-1)[:, :-3:-1].tolist()
    # And without the folder's own loader, where TVM is installed and not imported.
    script = script.replace("load.load()", "tvm_sparse.load_module('.')")
    command = [sys.executable, "-c", script.replace("numpy, load", "numpy, tvm_sparse")]
    again = subprocess.run(command, cwd=tmp_path / "dist", capture_output=True, text=True)
    assert again.stdout == done.stdout, again.stderr


# --- Python -----------------------------------------------------------------------------------

RUN = """
import importlib.util, json, sys
for name in ("tvm", "tvm_sparse", "onnx", "scipy"):
    assert importlib.util.find_spec(name) is None, name
import numpy as np
import load
model = load.load(threads=int(sys.argv[1]), verify=True)
assert model.threads == int(sys.argv[1])
with np.load(sys.argv[2]) as file:
    inputs = {name: file[name] for name in file.files}
outputs = model.run(inputs)
again = model(*(inputs[spec.name] for spec in model.inputs))
again = again if isinstance(again, list) else [again]
for first, second in zip(outputs.values(), again, strict=True):
    np.testing.assert_array_equal(first, second)
np.savez(sys.argv[3], **{str(i): value for i, value in enumerate(outputs.values())})
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_numpy_and_tvm_ffi_alone_run_a_package(
    packages: dict[str, Path], tmp_path: Path, threads: int
) -> None:
    python = clean_python(tmp_path)
    for name, folder in packages.items():
        inputs, given, got = inputs_of(name), tmp_path / "in.npz", tmp_path / "out.npz"
        np.savez(given, **{key.replace("/", "%"): value for key, value in inputs.items()})
        script = RUN.replace("name: file[name]", "name.replace('%', '/'): file[name]")
        done = run_clean([python, "-c", script, threads, given, got], folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        with np.load(got) as found:
            want = ts.load_module(folder, threads=threads).run(inputs)
            for number, value in enumerate(want.values()):
                np.testing.assert_array_equal(found[str(number)], value)


SENTENCE = """
import sys, numpy as np, load
try:
    model = load.load(sys.argv[1], verify=sys.argv[2] == "verify")
    model.run({name: np.zeros(tuple(shape), dtype) for name, shape, dtype in INPUTS})
except load.SparseError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""
WRONG_INPUTS = [
    ([("x", (3, 8), "float32")], "the model misses 'z/0'; its inputs are 'x', 'z/0'"),
    (
        [("x", (3, 8), "float32"), ("y", (3, 5), "float32")],
        "the model does not know 'y' and misses 'z/0'; its inputs are 'x', 'z/0'",
    ),
    (
        [("x", (3, 8), "int64"), ("z/0", (3, 5), "float32")],
        "input 'x' is int64, and the model wants float32: convert it with .astype('float32')",
    ),
    (
        [("x", (3, 8, 1), "float32"), ("z/0", (3, 5), "float32")],
        "input 'x' has 3 dimensions, (3, 8, 1); the model wants (batch, 8)",
    ),
    (
        [("x", (3, 7), "float32"), ("z/0", (3, 5), "float32")],
        "input 'x' has shape (3, 7), and the model wants (batch, 8)",
    ),
    (
        [("x", (3, 8), "float32"), ("z/0", (2, 5), "float32")],
        "input 'z/0' has shape (2, 5), and the model wants (batch, 5): "
        "'batch' is 3 in input 'x' and 2 here",
    ),
]


def test_the_loader_refuses_inputs_in_the_words_of_the_product(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    python, module = clean_python(tmp_path), ts.load_module(packages["pair"])
    for inputs, sentence in WRONG_INPUTS:
        with pytest.raises(ts.SparseError) as error:
            module.run({name: np.zeros(shape, dtype) for name, shape, dtype in inputs})
        assert str(error.value) == sentence
        script = SENTENCE.replace("INPUTS", repr(inputs))
        done = run_clean([python, "-c", script, packages["pair"], ""], packages["pair"])
        assert (done.returncode, done.stderr) == (1, sentence + "\n")


def test_the_loader_refuses_a_changed_file_before_it_is_loaded(
    package: Path, tmp_path: Path
) -> None:
    (package / "libtvm_runtime.so").write_bytes(b"\x7fELF, but not ours")
    script = SENTENCE.replace("INPUTS", "[]")
    done = run_clean([clean_python(tmp_path), "-c", script, package, "verify"], package)
    assert done.returncode == 1
    assert f"'{package / 'libtvm_runtime.so'}' was changed or is another file" in done.stderr


def test_another_version_of_the_ffi_package_is_refused(package: Path) -> None:
    path = package / MANIFEST
    data = json.loads(path.read_text())
    data["versions"]["apache-tvm-ffi"] = "0.1.99"
    path.write_text(json.dumps(data))
    with pytest.raises(LibraryError, match=r"made for apache-tvm-ffi 0\.1\.99, and"):
        load(package)


# --- C++ --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_example(packages["pair"], tmp_path_factory.mktemp("cpp"))


def arguments(inputs: dict[str, np.ndarray], folder: Path) -> list[str]:
    given = []
    for number, (name, value) in enumerate(inputs.items()):
        np.save(folder / f"in{number}.npy", value)
        given.append(f"{name}={folder / f'in{number}.npy'}")
    return given


def fnv1a(data: bytes) -> str:
    state = 0xCBF29CE484222325
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 % (1 << 64)
    return f"{state:016x}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_example_computes_what_python_does_bit_for_bit(
    example: Path, packages: dict[str, Path], tmp_path: Path, name: str, threads: int
) -> None:
    inputs, folder = inputs_of(name), packages[name]
    want = ts.load_module(folder, threads=threads).run(inputs)
    outputs = {key: tmp_path / f"out{number}.npy" for number, key in enumerate(want)}
    asked = [word for key, path in outputs.items() for word in ("--output", f"{key}={path}")]
    command = [example, folder, *arguments(inputs, tmp_path), *asked, "--repeat", 3]
    done = run_clean([*command, "--threads", threads], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for line, (key, value) in zip(lines, want.items(), strict=False):
        found = np.load(outputs[key])
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
        assert line == f"{key}: {value.dtype} {value.shape} checksum {fnv1a(value.tobytes())}"
    assert lines[len(want)].startswith("3 runs after one: median ")


def test_the_example_refuses_inputs_in_the_same_words(
    example: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    for inputs, sentence in WRONG_INPUTS:
        arrays = {name: np.zeros(shape, dtype) for name, shape, dtype in inputs}
        done = run_clean([example, packages["pair"], *arguments(arrays, tmp_path)], tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"example: {sentence}\n"


@pytest.mark.parametrize("words", [[], ["dist", "x"], ["dist", "--repeat", "0"], ["--wrong", "1"]])
def test_the_example_knows_wrong_usage(example: Path, tmp_path: Path, words: list[str]) -> None:
    done = run_clean([example, *words], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("usage: example FOLDER")


def test_the_example_says_what_is_missing(
    example: Path, package: Path, packages: dict[str, Path], tmp_path: Path
) -> None:
    given = arguments(inputs_of("pair"), tmp_path)
    (package / "model.so").write_bytes(b"\x7fELF")
    for command, sentence in [
        ([tmp_path], f"cannot read '{tmp_path}/manifest.json': No such file or directory"),
        ([package, *given], f"'{package}/model.so' has 4 bytes, and was packaged with"),
        ([packages["pair"], "x=nowhere.npy"], "cannot read 'nowhere.npy': No such file"),
        ([packages["pair"], *given, "--output", "q=q.npy"], "the model has no output 'q'; its"),
    ]:
        done = run_clean([example, *command], tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(f"example: {sentence}"), done.stderr


def test_the_example_refuses_what_this_machine_lacks(example: Path, tmp_path: Path) -> None:
    export(pair_executable(), pair_manifest(cpu_features=("sse4.2", "quantum9")), tmp_path / "m.so")
    ts.package(tmp_path / "m.so", tmp_path / "dist")
    given = arguments(inputs_of("pair"), tmp_path)
    done = run_clean([example, tmp_path / "dist", *given], tmp_path)
    assert done.returncode == 1
    assert "lacks: quantum9; compile for another target" in done.stderr
    with pytest.raises(TargetError, match="lacks: quantum9; compile for another target"):
        load(tmp_path / "dist")


# --- trust ------------------------------------------------------------------------------------


def test_a_package_that_nobody_touched_is_verified(package: Path) -> None:
    x, z = pair_inputs()
    digest = sha256_of(package / MANIFEST)
    for verify in (True, digest, digest.upper(), package / MANIFEST):
        assert_pair(ts.load_module(package, verify=verify)(x, z), x, z)
    for verify in (True, sha256_of(package / "model.so"), str(package / MANIFEST)):
        assert_pair(ts.load_module(package / "model.so", verify=verify)(x, z), x, z)


@pytest.mark.parametrize("name", ["model.so", "libtvm_ffi.so", "load.py", "cpp/example.cpp"])
def test_the_file_that_was_changed_is_named(package: Path, name: str) -> None:
    path = package / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LibraryError, match=f"{name}' was changed or is another file: its SHA-256"):
        ts.load_module(package, verify=True)


def test_nothing_of_a_changed_library_runs(package: Path, tmp_path: Path) -> None:
    """The library in its place would leave a file behind as soon as it is loaded."""
    from package_support import compiler

    source, trace = tmp_path / "evil.c", tmp_path / "ran"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) void run(void) "
        f'{{ fclose(fopen("{trace}", "w")); }}\n'
    )
    command = [compiler(), "-shared", "-fPIC", source, "-o", package / "model.so"]
    assert run_clean(command, tmp_path).returncode == 0
    for place in (package, package / "model.so"):
        with pytest.raises(LibraryError, match="was changed or is another file"):
            ts.load_module(place, verify=True)
    assert not trace.exists()


def test_a_missing_file_and_a_library_too_many_are_named(package: Path) -> None:
    shutil.copy(package / "libtvm_ffi.so", package / "libstdc++.so.6")
    with pytest.raises(LibraryError, match=r"libstdc\+\+\.so\.6' is not among the files"):
        ts.load_module(package, verify=True)
    (package / "libstdc++.so.6").unlink()
    (package / "load.py").unlink()
    with pytest.raises(LibraryError, match=r"cannot read '.*load\.py': No such file"):
        ts.load_module(package, verify=True)


def test_a_manifest_that_was_changed_along_is_caught_by_a_hash_from_elsewhere(
    package: Path, tmp_path: Path
) -> None:
    digest = sha256_of(package / MANIFEST)
    kept = Path(shutil.copy(package / MANIFEST, tmp_path / "kept.json"))
    library, path = package / "model.so", package / MANIFEST
    library.write_bytes(library.read_bytes() + b"more")
    data = json.loads(path.read_text())
    data["files"]["model.so"] = {"sha256": sha256_of(library), "bytes": library.stat().st_size}
    path.write_text(json.dumps(data))
    ts.load_module(package, verify=True)
    for verify in (digest, kept):
        with pytest.raises(LibraryError, match=r"manifest\.json' was changed or is another"):
            ts.load_module(package, verify=verify)
    with pytest.raises(LibraryError, match=r"model\.so' was changed or is another"):
        ts.load_module(library, verify=kept)


def test_a_library_without_a_manifest_beside_it_is_not_verified(tmp_path: Path) -> None:
    pair_module().export(tmp_path / "other.so")
    with pytest.raises(LibraryError, match=r"cannot read '.*manifest\.json'"):
        ts.load_module(tmp_path / "other.so", verify=True)
    ts.package(tmp_path / "other.so", tmp_path / "dist")
    with pytest.raises(LibraryError, match=r"lists no file 'other\.so' to verify it by"):
        ts.load_module(tmp_path / "other.so", verify=tmp_path / "dist" / MANIFEST)


# --- writing ----------------------------------------------------------------------------------


def test_a_package_replaces_an_older_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for module in (pair_module(), large_module()):
        ts.package(module, tmp_path / "dist")
        (tmp_path / "dist" / "__pycache__").mkdir()
    (tmp_path / "empty").mkdir()
    ts.package(large_module(), tmp_path / "empty")
    x = large_input()
    for name in ("dist", "empty"):
        np.testing.assert_array_equal(ts.load_module(tmp_path / name)(x), large_output(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dist", "empty"]


def test_what_is_no_package_is_not_replaced_unless_that_is_wished(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    for name in ("folder", "file"):
        with pytest.raises(LibraryError, match=r"is there already and is no .*--force"):
            ts.package(pair_module(), tmp_path / name)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more of it"
    for name in ("folder", "file"):
        ts.package(pair_module(), tmp_path / name, force=True)
        assert read_package_manifest(tmp_path / name / MANIFEST)
    assert not (tmp_path / "folder" / "thesis.txt").exists()


def test_files_that_somebody_put_into_a_package_are_not_lost(package: Path) -> None:
    (package / "results.npz").touch()
    with pytest.raises(LibraryError, match=r"holds 'results\.npz', which no package wrote"):
        ts.package(pair_module(), package)
    assert (package / "results.npz").exists()


def test_the_folder_that_one_works_in_is_never_replaced(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(package)
    for source in (pair_module(), package / "model.so"):
        with pytest.raises(LibraryError, match="is not replaced: "):
            ts.package(source, package, force=True)
    monkeypatch.chdir("/")
    with pytest.raises(LibraryError, match=r"is not replaced: '.*model\.so' is in it"):
        ts.package(package / "model.so", package, force=True)


def test_a_failure_leaves_the_older_package(package: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    for source in (tmp_path / "broken.so", tmp_path / "missing.so"):
        with pytest.raises(LibraryError):
            ts.package(source, package)
    ts.load_module(package, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.so", "package"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_without_rights_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LibraryError, match=r"cannot write '.*dist': Permission denied"):
        ts.package(pair_module(), tmp_path / "dist")


# --- the command line -------------------------------------------------------------------------


def test_the_command_line_packages_verifies_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library, dist, x = tmp_path / "model.so", tmp_path / "dist", tmp_path / "x.npy"
    large_module().export(library)
    np.save(x, large_input())
    assert main(["package", str(library), "-o", str(dist), "--cpp"]) == 0
    said = capsys.readouterr().out
    digest = said.strip().rpartition(" ")[2]
    assert digest == sha256_of(dist / MANIFEST) and "libtvm_runtime.so" in said
    for verify in ([], ["--verify"], ["--verify", digest], ["--verify", str(dist / MANIFEST)]):
        command = ["run", str(dist), *verify, "--input", f"x={x}", "--output", f"{tmp_path}/y.npy"]
        assert main(command) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), large_output(large_input()))
    (dist / "README.md").write_text("changed")
    assert main(["run", str(dist), "--verify", "--input", f"x={x}"]) == 1
    assert "README.md' was changed or is another file" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main(["package", str(library), "-o", str(tmp_path / "other")]) == 1
    assert "is no package; choose another folder, or --force" in capsys.readouterr().err
    assert main(["package", str(library), "-o", str(tmp_path / "other"), "--force"]) == 0
