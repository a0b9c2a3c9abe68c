"""A manifest goes into a library and comes back whole, or says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.errors import LibraryError
from tvm_sparse.manifest import FORMAT, Manifest, read_manifest, to_c_source, to_record
from tvm_sparse.model import TensorSpec

names = st.text(max_size=20)
specs = st.builds(
    TensorSpec,
    name=names,
    shape=st.lists(st.one_of(st.integers(0, 2**40), names), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "int64", "bool"]),
)
manifests = st.builds(
    Manifest,
    package_version=names,
    tvm_version=names,
    target=st.dictionaries(names, names, max_size=3),
    cpu_features=st.lists(names, max_size=3).map(tuple),
    threads=st.integers(1, 256),
    inputs=st.lists(specs, max_size=3).map(tuple),
    outputs=st.lists(specs, max_size=3).map(tuple),
    plan=st.dictionaries(names, st.lists(st.integers(), max_size=3), max_size=3),
    report=st.dictionaries(names, st.floats(allow_nan=False), max_size=3),
    digest=names,
    kernels=st.dictionaries(names, st.lists(names, max_size=3).map(tuple), max_size=3),
)

SMALL = Manifest(
    package_version="0.1.0",
    tvm_version="0.27.0",
    target={"kind": "llvm"},
    cpu_features=("avx2",),
    threads=2,
    inputs=(TensorSpec("x", ("batch", 4), "float32"),),
    outputs=(TensorSpec("y", ("batch", 3), "float32"),),
    kernels={"spmm": ("fc1", "fc2")},
)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.so"
    path.write_bytes(data)
    return path


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(SMALL.to_json()), **changes})


@settings(max_examples=60, deadline=None)
@given(manifests)
def test_json_gives_the_same_manifest_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=40, deadline=None)
@given(manifests, st.binary(min_size=1, max_size=200), st.binary(max_size=200))
def test_a_record_is_found_between_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, manifest: Manifest, before: bytes, after: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("record"), before + to_record(manifest) + after)
    assert read_manifest(path) == manifest


@pytest.mark.parametrize("missing", [1, 40, 1000])
def test_a_marker_without_its_record_is_passed_over(tmp_path: Path, missing: int) -> None:
    record = to_record(SMALL)
    torn = record[: max(len(record) - missing, 30)]
    assert read_manifest(write(tmp_path, torn + bytes(100) + record)) == SMALL


def test_a_marker_alone_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="did not export it: it has no manifest"):
        read_manifest(write(tmp_path, to_record(SMALL)[:40]))


def test_a_changed_byte_of_the_text_is_noticed(tmp_path: Path) -> None:
    data = bytearray(to_record(SMALL))
    data[-5] ^= 1
    with pytest.raises(LibraryError, match="no manifest"):
        read_manifest(write(tmp_path, bytes(data)))


@pytest.mark.parametrize("kind", ["missing", "empty", "folder"])
def test_an_unreadable_file_is_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.so"
    if kind == "empty":
        path.touch()
    if kind == "folder":
        path.mkdir()
    with pytest.raises(LibraryError, match=r"cannot read '.*model\.so': "):
        read_manifest(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "does not say which format"),
        (edited(format=FORMAT + 1), f"format {FORMAT + 1}.*exported by tvm_sparse 0.1.0"),
        (edited(threads="two"), "broken 'threads'"),
        (edited(threads=True), "broken 'threads'"),
        (edited(cpu_features=[1]), "broken 'cpu_features'"),
        (edited(inputs=[3]), "broken 'inputs'"),
        (edited(inputs=[{"name": "x", "shape": [1.5], "dtype": "float32"}]), "broken 'inputs'"),
        (edited(outputs=[{"name": "x", "shape": [1]}]), "lacks 'dtype'"),
        (edited(kernels={"k": "fc1"}), "broken 'k'"),
    ],
)
def test_a_broken_manifest_says_what_is_broken(text: str, sentence: str) -> None:
    with pytest.raises(LibraryError, match=sentence):
        Manifest.from_json(text)


def test_a_missing_field_is_named() -> None:
    data = json.loads(SMALL.to_json())
    for key in set(data) - {"format"}:
        rest = {name: value for name, value in data.items() if name != key}
        with pytest.raises(LibraryError, match=f"lacks '{key}'"):
            Manifest.from_json(json.dumps(rest))


def test_the_c_source_is_plain_ascii_and_holds_no_trigraph() -> None:
    odd = Manifest(**{**vars(SMALL), "digest": '??= %d \\ " é 7'})
    source = to_c_source(odd)
    assert source.isascii() and "??" not in source and os.linesep in source
