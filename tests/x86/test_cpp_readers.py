"""What the C++ wrapper reads: whatever the bytes are, it is right or says a sentence."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from package_support import CPP, compiler, run_clean, sanitizers

from tvm_sparse.manifest import Manifest
from tvm_sparse.model import TensorSpec
from tvm_sparse.package_manifest import MANIFEST, PackageManifest, PackedFile
from tvm_sparse.runtime import describe

DTYPES = ("float32", "float16", "int64", "int32", "bool")
OTHERS = (">f4", "<f8", "<u4", "<c8", "S3", "<U2", "V2", "<M8[s]")

fuzzing = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


class Reader:
    """The wrapper's readers in a process that lives through the tests: a crash ends it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *lines: str | Path) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()
        answer = self.process.stdout.readline().rstrip("\n")
        assert answer, "the program has crashed"
        return answer

    def copy_npy(self, data: bytes) -> tuple[str, bytes]:
        """Return what it says, and the copy that it wrote."""
        source, copy = self.folder / "in.npy", self.folder / "out.npy"
        source.write_bytes(data)
        copy.write_bytes(b"")
        return self.ask("copy", source, copy), copy.read_bytes()

    def read_manifest(self, text: bytes) -> str:
        (self.folder / MANIFEST).write_bytes(text)
        return self.ask("manifest", self.folder)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("readers")
    source, program = Path(__file__).with_name("read_files.cpp"), folder / "read_files"
    options = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", *sanitizers(folder)]
    done = run_clean([compiler(), *options, "-I", CPP, source, "-o", program], folder)
    assert done.returncode == 0, done.stderr
    running = Reader(program, folder)
    yield running
    running.process.communicate()
    assert running.process.returncode == 0


def saved(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0))
)


@fuzzing
@given(arrays, st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_arrays_come_back_bit_for_bit(
    reader: Reader, array: np.ndarray, version: tuple[int, int]
) -> None:
    said, copy = reader.copy_npy(saved(array, version))
    assert said == "ok"
    found = np.load(BytesIO(copy), allow_pickle=False)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    # As NumPy writes it, padding included.
    assert copy == saved(np.ascontiguousarray(array).reshape(array.shape))


@pytest.mark.parametrize("dtype", OTHERS)
def test_other_types_are_refused_by_name(reader: Reader, dtype: str) -> None:
    said, _ = reader.copy_npy(saved(np.zeros(3, dtype)))
    assert f"it holds '{np.lib.format.dtype_to_descr(np.dtype(dtype))}': float32, float16" in said


def test_records_and_pickles_are_no_arrays(reader: Reader) -> None:
    record = np.zeros(2, [("a", "<f4"), ("b", "<i4")])
    stream = BytesIO()
    np.save(stream, np.array([{}, None], object), allow_pickle=True)
    for data in (saved(record), stream.getvalue()):
        assert reader.copy_npy(data)[0].startswith("error: cannot read '")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (saved(np.asfortranarray(np.zeros((2, 3), "f4"))), "it is in Fortran's order"),
        (saved(np.zeros(9, "f4"))[:-1], "it is cut off"),
        (saved(np.zeros(9, "f4")) + b"\0", "it holds more than the array of its header"),
        (saved(np.zeros(9, "f4"))[:50], "it is cut off"),
        (b"", "it is cut off"),
        (b"\x93NUMPY\x09\0" + bytes(99), "it has an unknown version of the format"),
        (b"PK\x03\x04 an archive", "it is not a .npy file"),
        (saved(np.zeros(3, bool))[:-1] + b"\2", "it holds other numbers than 0 and 1 as bool"),
        (saved(np.zeros(8, "f4")).replace(b"(8,)", b"(8,"), "its header is none"),
        (saved(np.zeros(8, "f4")).replace(b"(8,), ", b"(-8,),"), "its header is none"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(reader: Reader, data: bytes, sentence: str) -> None:
    said = reader.copy_npy(data)[0]
    assert said.startswith("error: cannot read '") and sentence in said


@pytest.mark.parametrize("shape", ["(9999999999999,)", "(4294967296, 4294967296, 4294967296)"])
def test_an_announced_size_takes_no_memory(reader: Reader, shape: str) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    said = reader.copy_npy(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text)[0]
    assert "it is cut off" in said or "larger than any memory" in said


def test_a_missing_file_is_a_sentence(reader: Reader) -> None:
    said = reader.ask("copy", "/no/such.npy", "/tmp/never.npy")
    assert said == "error: cannot read '/no/such.npy': No such file or directory"


@st.composite
def damaged(draw: Any, original: bytes) -> bytes:
    """The bytes with a few changed, cut or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 30))]
        elif at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


SMALL_ARRAY = saved(np.arange(6, dtype=np.float32).reshape(2, 3))


@fuzzing
@given(st.one_of(damaged(SMALL_ARRAY), st.binary(max_size=300)))
def test_damaged_arrays_are_read_as_numpy_does_or_refused(reader: Reader, data: bytes) -> None:
    said, copy = reader.copy_npy(data)
    if said != "ok":
        assert said.startswith("error: cannot read '")
        return
    want = np.load(BytesIO(data), allow_pickle=False)
    assert np.load(BytesIO(copy), allow_pickle=False).tobytes() == want.tobytes()


def manifest_of(*inputs: TensorSpec) -> PackageManifest:
    model = Manifest(
        package_version="0.1.0",
        tvm_version="0.27.0",
        target={"kind": "llvm"},
        cpu_features=("sse4.2",),
        threads=2,
        inputs=inputs,
        outputs=(TensorSpec("y", (3,), "float32"),),
    )
    files = {"model.so": PackedFile("0" * 64, 17)}
    return PackageManifest(
        "model.so", {"apache-tvm-ffi": "0.1"}, files, {"sse4.2": "sse4_2"}, model
    )


# A line of text; half a character of UTF-16 has no bytes to compare.
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
specs = st.builds(
    TensorSpec,
    name=names,
    shape=st.lists(st.one_of(st.integers(0, 2**62), names), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
)


@fuzzing
@given(st.lists(specs, max_size=3), st.booleans())
def test_manifests_are_read_as_they_were_written(
    reader: Reader, inputs: list[TensorSpec], as_ascii: bool
) -> None:
    text = manifest_of(*inputs).to_json()
    if not as_ascii:
        text = json.dumps(json.loads(text), ensure_ascii=False)
    assert reader.read_manifest(text.encode()) == " | ".join(["ok", *map(describe, inputs)])


WHOLE = manifest_of(TensorSpec("x", ("batch", 8), "float32")).to_json().encode()


@fuzzing
@given(st.one_of(damaged(WHOLE), st.binary(max_size=300)))
def test_damaged_manifests_are_refused_or_still_whole(reader: Reader, data: bytes) -> None:
    said = reader.read_manifest(data)
    assert said.startswith(("ok", "error: '"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"[" * 100_000, "it is not valid JSON, at byte"),
        (b"{}", "it is not the manifest of a package"),
        (WHOLE.replace(b'"version": 1', b'"version": 2'), "it is of another version"),
        (WHOLE.replace(b'"threads": 2', b'"threads": 0'), "its 'threads' is below 1"),
        (WHOLE.replace(b'"threads": 2', b'"threads": "2"'), "a field of it is of the wrong kind"),
        (WHOLE.replace(b'"bytes": 17', b'"bytes": 1e99'), "is no whole number of 64 bits"),
        (WHOLE.replace(b'"cpu_flags"', b'"flags"'), "it lacks 'cpu_flags'"),
        (WHOLE.replace(b'"library": "', b'"library": "../'), "lacks the library '../model.so'"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(reader: Reader, text: bytes, sentence: str) -> None:
    said = reader.read_manifest(text)
    assert said.startswith("error: '") and "is no manifest of a package" in said
    assert sentence in said
