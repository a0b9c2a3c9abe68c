"""A package's manifest: the same when it is read back, and a sentence when it is something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_sparse.errors import LibraryError
from tvm_sparse.manifest import Manifest
from tvm_sparse.model import TensorSpec
from tvm_sparse.package_manifest import (
    MANIFEST,
    PackageManifest,
    PackedFile,
    library_of,
    read_package_manifest,
    sha256_of,
    verify_files,
)

MODEL = Manifest(
    package_version="0.1.0",
    tvm_version="0.27.0",
    target={"kind": "llvm"},
    cpu_features=("avx2",),
    threads=2,
    inputs=(TensorSpec("x", ("batch", 4), "float32"),),
    outputs=(TensorSpec("y", ("batch", 3), "float32"),),
    plan={"layers": [1]},
    report={"text": "long"},
    kernels={"spmm": ("fc1",)},
)
SMALL = PackageManifest(
    library="model.so",
    versions={"apache-tvm-ffi": "0.1.14"},
    files={"model.so": PackedFile("0" * 64, 3), "cpp/example.cpp": PackedFile("a" * 64, 0)},
    cpu_flags={"avx2": "avx2"},
    model=MODEL,
)
TEXT = SMALL.to_json()


def edited(**changes: Any) -> str:
    return json.dumps({**json.loads(TEXT), **changes})


def file_named(name: str, **changes: Any) -> str:
    files = json.loads(TEXT)["files"]
    return edited(files={**files, name: {"sha256": "0" * 64, "bytes": 1, **changes}})


def test_it_is_the_same_when_read_back_but_for_what_only_the_library_holds() -> None:
    found = PackageManifest.from_json(TEXT)
    assert (found.library, found.versions, found.files) == (
        SMALL.library,
        SMALL.versions,
        SMALL.files,
    )
    assert found.cpu_flags == SMALL.cpu_flags
    assert found.model.inputs == MODEL.inputs and found.model.threads == 2
    assert not found.model.plan and not found.model.report and not found.model.kernels
    assert PackageManifest.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "it is not valid JSON"),
        ("[" * 10**6, "it is not valid JSON"),
        ("[]", "it is not the manifest of a package"),
        (edited(kind="other"), "it is not the manifest of a package"),
        (edited(version=2), "it has version 2, and this version of tvm_sparse reads version 1"),
        (edited(files=[]), "broken 'files'"),
        (edited(files={"model.so": 3}), "broken 'files'"),
        (edited(library="other.so"), "its list of files lacks the library 'other.so'"),
        (edited(versions={"numpy": 2}), "broken 'versions'"),
        (edited(model={}), "does not say which format"),
        (file_named("../x"), "its file '../x' would lie outside the folder"),
        (file_named("/etc/passwd"), "its file '/etc/passwd' would lie outside the folder"),
        (file_named(""), "its file '' would lie outside the folder"),
        (file_named("a", sha256="abc"), "the SHA-256 of 'a' is not one: 'abc'"),
        (file_named("a", bytes="3"), "broken 'bytes'"),
    ],
)
def test_what_is_wrong_is_said(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(LibraryError) as error:
        PackageManifest.from_json(text)
    assert sentence in str(error.value)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(LibraryError, match=r"manifest\.json' is no manifest of a package: "):
        library_of(tmp_path)


@given(st.data())
def test_a_damaged_manifest_is_read_or_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TEXT)))
    length = data.draw(st.integers(0, 40))
    damaged = TEXT[:at] + data.draw(st.text(max_size=5)) + TEXT[at + length :]
    try:
        PackageManifest.from_json(damaged)
    except LibraryError as error:
        assert "\n" not in str(error)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(LibraryError, match="is no manifest of a package"):
        read_package_manifest(tmp_path / MANIFEST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.so").write_bytes(b"ELF")
    files = {"model.so": PackedFile(sha256_of(tmp_path / "model.so"), 3)}
    manifest = PackageManifest("model.so", {}, files, {}, MODEL)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    return tmp_path


def test_without_verifying_nothing_is_read(tmp_path: Path) -> None:
    verify_files(tmp_path / "nowhere", False)


def test_a_hash_is_that_of_the_library_or_of_a_folders_manifest(folder: Path) -> None:
    library = folder / "model.so"
    verify_files(library, sha256_of(library))
    verify_files(folder, sha256_of(folder / MANIFEST))
    for place in (library, folder):
        with pytest.raises(LibraryError, match=r"is not the one that was asked for, 0{64}$"):
            verify_files(place, "0" * 64)


def test_a_word_that_is_no_hash_is_a_manifests_name(folder: Path) -> None:
    with pytest.raises(LibraryError, match="cannot read 'deadbeef'"):
        verify_files(folder, "deadbeef")
