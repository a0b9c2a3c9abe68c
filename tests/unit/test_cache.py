"""The cache of libraries: what names a library, who may write it, and what is removed when."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tvm_sparse import cache_key, zoo
from tvm_sparse.cache import DEFAULT_BYTES, DamagedEntryError, LibraryCache
from tvm_sparse.cache_key import LibraryKey, key_here, model_digest
from tvm_sparse.cli import main
from tvm_sparse.errors import SparseError

KEYS = ("a" * 32, "b" * 32, "c" * 32, "d" * 32)


@pytest.fixture
def cache(tmp_path) -> LibraryCache:
    return LibraryCache(tmp_path / "libraries", limit=1000)


def keep(cache: LibraryCache, key: str, size: int = 300, used: float | None = None) -> Path:
    with cache.locked(key, alone=True):
        path = cache.store(key, lambda path: path.write_bytes(b"x" * size), {"model": key[0]}).path
    if used is not None:
        os.utime(path.with_name("entry.json"), (used, used))
    return path


def kept(cache: LibraryCache) -> str:
    return "".join(sorted(library.key[0] for library in cache.entries()))


# Keys --------------------------------------------------------------------------------------------

KEY = LibraryKey(
    model="m",
    shapes={"x": (1, 2)},
    target="native",
    machine="a processor",
    features=("avx2",),
    threads=1,
    options={"check": True},
    records="r",
    plan="p",
    calibration="c",
    versions={"apache-tvm": "0.27.0"},
    code="k",
)
OTHERS: dict[str, Any] = {
    "model": "n",
    "shapes": {"x": (1, 3)},
    "target": "x86-64-v3",
    "machine": "another processor",
    "features": ("avx2", "avx512f"),
    "threads": 2,
    "options": {"check": False},
    "records": "s",
    "plan": "q",
    "calibration": "d",
    "versions": {"apache-tvm": "0.28.0"},
    "code": "l",
}


def test_the_table_of_other_values_has_every_field():
    assert set(OTHERS) == {field.name for field in dataclasses.fields(LibraryKey)}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_decides_the_key(name):
    assert dataclasses.replace(KEY, **{name: OTHERS[name]}).digest() != KEY.digest()


def test_the_same_fields_give_the_same_key():
    assert dataclasses.replace(KEY).digest() == KEY.digest()
    both = {"x": (1,), "y": (2,)}
    turned = dict(reversed(both.items()))
    assert (
        dataclasses.replace(KEY, shapes=both).digest()
        == dataclasses.replace(KEY, shapes=turned).digest()
    )


@pytest.fixture
def surroundings(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TVM_SPARSE_HOME", str(tmp_path))
    for name in ("records", "plan", "machine-1.json"):
        (tmp_path / name).write_text("before")
    return tmp_path


def gathered(folder: Path, **changes: Any) -> str:
    given = {
        "model": "m",
        "target": "native",
        "threads": 1,
        "shapes": {"x": (1, 2)},
        "records": folder / "records",
        "plan": folder / "plan",
        "options": {"check": True},
    }
    return key_here(**{**given, **changes}).digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"},
        {"target": "x86-64-v3"},
        {"target": {"kind": "llvm", "mcpu": "znver3"}},
        {"threads": 2},
        {"shapes": None},
        {"records": None},
        {"plan": None},
        {"options": {"check": False}},
    ],
    ids=str,
)
def test_what_is_asked_for_decides_the_key(surroundings, changes):
    assert gathered(surroundings, **changes) != gathered(surroundings)


@pytest.mark.parametrize("name", ["records", "plan", "machine-1.json", "machine-2.json"])
def test_what_stands_in_the_files_decides_the_key(surroundings, name):
    before = gathered(surroundings)
    assert gathered(surroundings) == before
    (surroundings / name).write_text("after")
    assert gathered(surroundings) != before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("machine_identity", "another processor"),
        ("machine_flags", frozenset({"sse2"})),
        ("cache_bytes", 1),
        ("_version", "9.9"),
        ("_code_digest", "another state of the checkout"),
    ],
)
def test_the_machine_and_what_is_installed_decide_the_key(surroundings, monkeypatch, name, value):
    before = gathered(surroundings)
    monkeypatch.setattr(cache_key, name, lambda *_: value)
    assert gathered(surroundings) != before


def test_the_key_of_a_model_follows_its_bytes_and_not_its_name(tmp_path):
    model = zoo.mlp(sizes=(8, 4)).SerializeToString()
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(model)
    assert model_digest(tmp_path / "a.onnx") == model_digest(tmp_path / "b.onnx")
    assert model_digest(tmp_path / "a.onnx") == model_digest(model)
    assert model_digest(zoo.mlp(sizes=(8, 5)).SerializeToString()) != model_digest(model)


def test_the_key_of_a_model_follows_its_external_data(tmp_path):
    place = tmp_path / "m.onnx"
    onnx.save_model(
        zoo.mlp(sizes=(64, 64)),
        place,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    before = model_digest(place)
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    changed = model_digest(place)
    (tmp_path / "m.data").unlink()
    assert len({before, changed, model_digest(place)}) == 3


def test_external_data_of_constants_in_branches_counts(tmp_path):
    tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "c")
    onnx.external_data_helper.set_external_data(tensor, "c.data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    value = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [4])
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [value]
    )
    node = onnx.helper.make_node("If", ["p"], ["y"], then_branch=branch, else_branch=branch)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [value]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "c.data").write_bytes(b"1" * 16)
    before = model_digest(tmp_path / "m.onnx")
    (tmp_path / "c.data").write_bytes(b"2" * 16)
    assert model_digest(tmp_path / "m.onnx") != before


# Entries -----------------------------------------------------------------------------------------


def test_what_was_stored_is_found_and_nothing_else(cache):
    path = keep(cache, KEYS[0], size=7)
    found = cache.find(KEYS[0])
    assert found is not None
    assert found.path == path
    assert found.path.read_bytes() == b"x" * 7
    assert found.about == {"model": "a"}
    assert cache.find(KEYS[1]) is None


def test_storing_again_replaces(cache):
    keep(cache, KEYS[0], size=7)
    keep(cache, KEYS[0], size=9)
    assert [library.size for library in cache.entries()] == [9]


def test_a_library_whose_writing_fails_is_not_there(cache):
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with cache.locked(KEYS[0], alone=True), pytest.raises(OSError, match="no space"):
        cache.store(KEYS[0], write, {})
    assert cache.find(KEYS[0]) is None
    assert not [place for place in cache.folder.iterdir() if not place.name.endswith(".lock")]


@pytest.mark.parametrize("damage", ["changed", "cut", "no library", "no entry", "torn entry"])
def test_damage_is_noticed_and_can_be_replaced(cache, damage):
    path = keep(cache, KEYS[0], size=100)
    if damage == "changed":
        path.write_bytes(b"x" * 99 + b"y")
    elif damage == "cut":
        path.write_bytes(b"x" * 50)
    elif damage == "no library":
        path.unlink()
    elif damage == "no entry":
        path.with_name("entry.json").unlink()
    else:
        path.with_name("entry.json").write_text('{"sha256": "')
    with pytest.raises(DamagedEntryError):
        cache.find(KEYS[0])
    keep(cache, KEYS[0], size=100)
    assert cache.find(KEYS[0]) is not None


# Bounds ------------------------------------------------------------------------------------------


def test_the_longest_unused_go_first(cache):
    now = time.time()
    for age, key in enumerate(KEYS[:3]):
        keep(cache, key, used=now - 1000 + age)
    cache.find(KEYS[0])
    keep(cache, KEYS[3])
    assert kept(cache) == "acd"


def test_the_library_that_was_stored_last_stays_however_large(cache):
    keep(cache, KEYS[0])
    keep(cache, KEYS[1], size=5000)
    assert kept(cache) == "b"


def test_a_library_in_use_is_passed_over(cache):
    now = time.time()
    for age, key in enumerate(KEYS[:3]):
        keep(cache, key, used=now - 1000 + age)
    with cache.locked(KEYS[0], alone=False):
        keep(cache, KEYS[3])
        assert kept(cache) == "acd"
        assert [library.key for library in cache.clear()] == [KEYS[2], KEYS[3]]
    assert kept(cache) == "a"


def test_a_loaded_file_lives_on_after_it_was_removed(cache):
    # What the system promises of mapped files holds for open ones, too.
    with open(keep(cache, KEYS[0], size=7), "rb") as stream:
        cache.clear()
        assert kept(cache) == ""
        assert stream.read() == b"x" * 7


def test_leftovers_of_killed_processes_go_when_they_are_old(cache):
    keep(cache, KEYS[0])
    old, new = cache.folder / ".new-old", cache.folder / ".new-new"
    for place in (old, new):
        place.mkdir()
        (place / "library.so").write_bytes(b"half")
    os.utime(old, (0, 0))
    keep(cache, KEYS[1])
    assert not old.exists()
    assert new.exists()
    assert kept(cache) == "ab"


@pytest.mark.parametrize(("text", "limit"), [("", DEFAULT_BYTES), ("0", 0), ("123", 123)])
def test_the_limit_comes_from_the_environment(tmp_path, monkeypatch, text, limit):
    monkeypatch.setenv("TVM_SPARSE_CACHE_BYTES", text)
    assert LibraryCache(tmp_path).limit == limit


def test_a_limit_that_is_no_number_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_SPARSE_CACHE_BYTES", "1GB")
    with pytest.raises(SparseError, match="TVM_SPARSE_CACHE_BYTES is a number of bytes"):
        LibraryCache(tmp_path)


# Several at once ---------------------------------------------------------------------------------


def _make_once(folder: Path, barrier: Any) -> None:
    """Do as a session does: look together with others, then make it alone."""
    cache = LibraryCache(folder, limit=10**6)
    barrier.wait(60)
    for _ in range(20):
        with cache.locked(KEYS[0], alone=True):
            if cache.find(KEYS[0]) is None:
                with open(folder / "made", "a") as log:
                    log.write("x")
                cache.store(KEYS[0], lambda path: path.write_bytes(os.urandom(4096)), {})
        with cache.locked(KEYS[0], alone=False):
            cache.find(KEYS[0])


def test_of_many_processes_one_makes_the_library(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_make_once, args=(tmp_path, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_whoever_waits_for_a_lock_that_was_removed_takes_the_new_one(cache):
    keep(cache, KEYS[0])
    order = []

    def wait() -> None:
        with cache.locked(KEYS[0], alone=True):
            order.append("second")
            assert cache.find(KEYS[0]) is None

    with cache._lock(KEYS[0], 2) as lock:
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        cache._discard(KEYS[0])
        lock.unlink()
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"]
    assert lock.exists()


# The command line --------------------------------------------------------------------------------


def test_the_command_line_lists_and_clears(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVM_SPARSE_HOME", str(tmp_path))
    cache = LibraryCache()
    keep(cache, KEYS[0], size=2048)
    (keep(cache, KEYS[1], size=1024).with_name("entry.json")).write_text("torn")
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "libraries")
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "aaaaaaaaaaaa" in out
    assert "damaged" in out
    assert "2 libraries, 3 KiB of at most" in out
    assert main(["cache", "clear"]) == 0
    assert "removed 2 libraries, 3 KiB" in capsys.readouterr().out
    assert cache.entries() == []


def test_a_cache_that_was_never_used_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TVM_SPARSE_HOME", str(tmp_path / "none"))
    assert main(["cache", "list"]) == 0
    assert "0 libraries" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_an_entry_is_plain_json(cache):
    entry = json.loads(keep(cache, KEYS[0]).with_name("entry.json").read_text())
    assert entry["about"] == {"model": "a"}
