"""Large weights are read-only data of the library, and used where the system mapped them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from deploy_support import (
    build,
    large_executable,
    large_input,
    large_module,
    large_output,
    manifest,
)

from tvm_sparse.deploy import export, load_module, wrap_executable
from tvm_sparse.errors import LibraryError
from tvm_sparse.model import TensorSpec
from tvm_sparse.weights import ALIGNMENT, LEAST_BYTES, WEIGHTS_FUNCTION, nbytes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.so"
    large_module().export(path)
    return path


def mapping_at(address: int) -> list[str]:
    """Rights, offset, device, inode and file of what is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *rest = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in bounds.split("-"))
        if first <= address < last:
            return rest
    raise AssertionError(f"nothing is mapped at {address:x}")


def test_the_fresh_module_and_the_library_compute_the_same(library: Path) -> None:
    x = large_input()
    np.testing.assert_array_equal(large_module()(x), large_output(x))
    np.testing.assert_array_equal(load_module(library)(x), large_output(x))


def test_the_virtual_machine_sees_the_memory_of_the_file(library: Path) -> None:
    loaded = load_module(library)
    weights = loaded.library.get_function(WEIGHTS_FUNCTION, query_imports=True)()
    assert len(weights) == 2
    for weight in weights:
        assert weight.data_ptr() % ALIGNMENT == 0
        rights, *_, file = mapping_at(weight.data_ptr())
        # Not writable: processes cannot but share it.
        assert rights == "r--p" and Path(file) == library


def test_asking_again_gives_the_same_tensors(library: Path) -> None:
    weights = load_module(library).library.get_function(WEIGHTS_FUNCTION, query_imports=True)
    assert weights().same_as(weights())


def test_two_libraries_keep_to_their_own_weights(library: Path, tmp_path: Path) -> None:
    from tvm import relax

    other = np.full((128, 96), 3, np.float32)

    def function(bb: object) -> None:
        x = relax.Var("x", relax.TensorType((128, 96), "float32"))
        with bb.function("main", [x]):
            with bb.dataflow():
                out = bb.emit_output(bb.emit(relax.op.add(x, relax.const(other))))
            bb.emit_func_output(out)

    taken: list[object] = []
    specs = TensorSpec("x", (128, 96), "float32"), TensorSpec("y", (128, 96), "float32")
    module = wrap_executable(
        build(function, taken), manifest((specs[0],), (specs[1],)), weights=taken
    )
    module.export(tmp_path / "other.so")
    x = large_input()
    for second in (module, load_module(tmp_path / "other.so")):
        np.testing.assert_array_equal(load_module(library)(x), large_output(x))
        np.testing.assert_array_equal(second(x), x + other)
        np.testing.assert_array_equal(large_module()(x), large_output(x))


def test_the_function_of_this_process_does_not_outlive_its_use() -> None:
    import tvm_ffi

    module = large_module()
    assert tvm_ffi.get_global_func(WEIGHTS_FUNCTION, allow_missing=True) is None
    np.testing.assert_array_equal(module(large_input()), large_output(large_input()))


def test_threads_that_ask_first_together_agree(library: Path, tmp_path: Path) -> None:
    # A copy, whose weights nobody has asked for yet.
    copy = tmp_path / "copy.so"
    copy.write_bytes(library.read_bytes())
    x = large_input()
    modules = [load_module(copy, threads=1) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda module: module(x), modules):
            np.testing.assert_array_equal(y, large_output(x))


PLAIN_TVM = """
import sys
import numpy as np
import tvm
from tvm import relax
machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
np.save(sys.argv[3], machine["main"](tvm.runtime.tensor(np.load(sys.argv[2]))).numpy())
"""


def test_plain_tvm_runs_the_library(library: Path, tmp_path: Path) -> None:
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, large_input())
    subprocess.run([sys.executable, "-c", PLAIN_TVM, library, x, y], check=True)
    np.testing.assert_array_equal(np.load(y), large_output(large_input()))


@pytest.mark.parametrize("name", ["two words", 'a "quoted" \\ one', "größe", "%s 100%"])
def test_any_folder_will_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    large_module().export(tmp_path / name / "model.so")
    x = large_input()
    np.testing.assert_array_equal(load_module(tmp_path / name / "model.so")(x), large_output(x))
    assert [entry.name for entry in (tmp_path / name).iterdir()] == ["model.so"]


def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'as: error: no weights today' >&2\nexit 1\n")
    compiler.chmod(0o755)
    executable, weights = large_executable()
    with pytest.raises(LibraryError, match="no weights today"):
        export(executable, manifest((), ()), tmp_path / "model.so", str(compiler), weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken-cc"]


def test_a_compiled_model_keeps_its_large_weights_outside(tmp_path: Path) -> None:
    import tvm_sparse as ts
    from tvm_sparse import zoo

    model = ts.prune(zoo.single_matmul(256, 256, 32), sparsity=0.8)
    module = ts.compile(model, target="x86-64-v2", threads=1)
    module.export(tmp_path / "model.so")
    loaded = load_module(tmp_path / "model.so")
    weights = loaded.library.get_function(WEIGHTS_FUNCTION, query_imports=True)()
    assert len(weights) and all(nbytes(weight) >= LEAST_BYTES for weight in weights)
    x = np.random.default_rng(0).standard_normal(module.inputs[0].shape).astype(np.float32)
    np.testing.assert_array_equal(loaded(x), module(x))


OVER_2_GIB = """
import sys
import numpy as np
from tvm_sparse.deploy import load_module
module = load_module(sys.argv[1], threads=1)
row = module(np.zeros((1, int(sys.argv[2])), "f4"), np.array([int(sys.argv[3])]))
status = open("/proc/self/status").read()
print(row.min(), row.max(), int(status.split("VmHWM:")[1].split()[0]) << 10)
"""


@pytest.mark.slow
def test_weights_over_2_gib_are_exported_loaded_and_not_copied(tmp_path: Path) -> None:
    """Reads one row of each of four weights of 590 MB: their sum is 1 + 2 + 3 + 4."""
    import shutil

    from tvm import relax

    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("needs 12 GiB of disk")
    rows, columns, count = 9000, 16384, 4

    def function(bb: object) -> None:
        x = relax.Var("x", relax.TensorType((1, columns), "float32"))
        row_number = relax.Var("row", relax.TensorType((1,), "int64"))
        with bb.function("main", [x, row_number]):
            with bb.dataflow():
                y = x
                for number in range(count):
                    weight = np.full((rows, columns), number + 1, np.float32)
                    row = bb.emit(relax.op.take(relax.const(weight), row_number, axis=0))
                    y = bb.emit(relax.op.add(y, row))
                out = bb.emit_output(y)
            bb.emit_func_output(out)

    taken: list[object] = []
    executable = build(function, taken)
    inputs = TensorSpec("x", (1, columns), "float32"), TensorSpec("row", (1,), "int64")
    outputs = (TensorSpec("y", (1, columns), "float32"),)
    path = tmp_path / "model.so"
    export(executable, manifest(inputs, outputs), path, weights=taken)
    assert path.stat().st_size > 1 << 31
    command = [sys.executable, "-c", OVER_2_GIB, str(path), str(columns), str(rows - 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    least, most, peak = done.stdout.split()
    assert (float(least), float(most)) == (10, 10)
    # Python with NumPy and TVM's runtime, and four rows.
    assert int(peak) < 500 << 20
    path.unlink()
