"""Records come back as they were written, and a line that is none costs nobody but itself."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse import formats
from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.errors import RecordError
from tvm_sparse.profile import profile_weight
from tvm_sparse.records import (
    STATUSES,
    Statistics,
    Subject,
    TuningRecord,
    append_records,
    code_digest,
    read_records,
    record_key,
    weight_digest,
)
from tvm_sparse.workload import (
    Conv2dGeometry,
    Epilogue,
    EpilogueOp,
    EpilogueRef,
    MatmulGeometry,
    Workload,
)

STATISTICS = Statistics(48, 64, 0.125, 0.31, 0.42, "unstructured")
BIAS_RELU = Epilogue(
    (
        EpilogueOp("add", (EpilogueRef("acc"), EpilogueRef("channel", 0))),
        EpilogueOp("maximum", (EpilogueRef("node", 0), EpilogueRef("scalar", value=0.5))),
    ),
    channels=1,
    tensors=2,
)
CONV = Conv2dGeometry(1, 8, 9, 10, 16, (3, 2), (2, 1), (0, 1, 2, 3), (1, 2), 2)


def subject_of(workload: Workload, **changes: Any) -> Subject:
    subject = Subject(
        workload,
        ("0f" * 12, "1e" * 12),
        STATISTICS,
        {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avx2", "-avx512f"]},
        "a processor (maker 6/85/7), 8 cores",
        "c0de" * 6,
        "0.27.0",
    )
    return replace(subject, **changes)


MATMUL = subject_of(Workload("matmul", MatmulGeometry(48, 64, 32), "float32", BIAS_RELU, 2))
SUBJECTS = {
    "matmul": MATMUL,
    "symbolic": subject_of(Workload("matmul", MatmulGeometry(48, 64, None))),
    "conv2d": subject_of(Workload("conv2d", CONV, "float32", BIAS_RELU)),
    "symbolic batch": subject_of(Workload("conv2d", replace(CONV, batch=None))),
}
CONFIG = {"mr": 4, "nt": 2, "kb": 64, "threads": 2}


def record_of(trial: int = 1, subject: Subject = MATMUL, **changes: Any) -> TuningRecord:
    record = TuningRecord(
        subject,
        "register_tile",
        CONFIG,
        "ok",
        us=12.5,
        low_us=12.25,
        high_us=13.0,
        samples=40,
        error_share=0.02,
        trial=trial,
        seconds=1.5,
        when="2025-01-02T03:04:05+00:00",
    )
    return replace(record, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


# What is written is read.

sizes = st.integers(1, 4096)
pairs = st.tuples(sizes, sizes)
refs = st.builds(
    EpilogueRef,
    kind=st.sampled_from(["acc", "node", "scalar", "channel", "tensor"]),
    index=st.integers(0, 9),
    value=st.floats(allow_nan=False),
)
epilogues = st.builds(
    Epilogue,
    ops=st.lists(
        st.builds(EpilogueOp, st.text(), st.lists(refs, max_size=3).map(tuple)), max_size=3
    ).map(tuple),
    channels=st.integers(0, 3),
    tensors=st.integers(0, 3),
)
matmuls = st.builds(
    MatmulGeometry,
    m=sizes,
    k=sizes,
    n=st.none() | sizes,
    layout=st.sampled_from(["rows", "panels"]),
)
convolutions = st.builds(
    Conv2dGeometry,
    batch=st.none() | sizes,
    in_channels=sizes,
    in_height=sizes,
    in_width=sizes,
    out_channels=sizes,
    kernel=pairs,
    strides=pairs,
    padding=st.tuples(*[st.integers(0, 9)] * 4),
    dilation=pairs,
    groups=sizes,
)


@st.composite
def workloads(draw: Callable[..., Any]) -> Workload:
    op = draw(st.sampled_from(["matmul", "conv2d"]))
    geometry = draw(matmuls if op == "matmul" else convolutions)
    dtype = draw(st.sampled_from(["float32", "float16"]))
    return Workload(op, geometry, dtype, draw(epilogues), draw(st.integers(1, 64)))


times = st.none() | st.floats(0, 1e9, exclude_min=True)
records = st.builds(
    TuningRecord,
    subject=st.builds(
        Subject,
        workload=workloads(),
        weights=st.lists(st.text(), max_size=3).map(tuple),
        statistics=st.builds(
            Statistics, sizes, sizes, st.floats(0, 1), st.floats(0, 9), st.floats(0, 9), st.text()
        ),
        target=st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())),
        machine=st.text(),
        code=st.text(),
        tvm=st.text(),
    ),
    kernel=st.text(),
    config=st.dictionaries(st.text(), st.integers() | st.booleans() | st.text()),
    status=st.sampled_from(STATUSES),
    us=times,
    low_us=times,
    high_us=times,
    samples=st.integers(0, 1000),
    error_share=st.none() | st.floats(0, 1),
    message=st.text(),
    trial=st.integers(0, 1000),
    seconds=st.floats(0, 1e6),
    when=st.text(),
)


@settings(max_examples=40)
@given(written=st.lists(records, min_size=1, max_size=3))
def test_records_come_back_equal_with_the_same_keys(
    written: list[TuningRecord], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    append_records(path, written[:1])
    append_records(path, written[1:])
    read = read_records(path)
    assert read.skipped == ()
    assert list(read.records) == written
    assert [record.key for record in read.records] == [record.key for record in written]
    assert [r.subject.key for r in read.records] == [r.subject.key for r in written]
    shutil.rmtree(path.parent)


def test_a_record_is_one_line_of_json_whatever_its_message_holds(path: Path) -> None:
    append_records(path, [record_of(message="two\nlines, \u2028 a separator and \0")])
    (line,) = path.read_bytes().splitlines()
    assert json.loads(line)["message"].startswith("two\nlines")
    assert read_records(path).records[0].message.startswith("two\nlines")


def test_a_record_is_ok_when_it_ran_rightly_and_has_a_time() -> None:
    assert record_of().ok
    assert not record_of(us=None).ok
    for status in set(STATUSES) - {"ok"}:
        assert not record_of(status=status).ok


# The key.


def changed(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Change a value in every place that it is made of, one at a time, and name the place."""
    if is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            for place, other in changed(getattr(value, f.name), f"{name}.{f.name}"):
                yield place, replace(value, **{f.name: other})
    elif isinstance(value, tuple):
        if value:
            yield f"{name} shorter", value[:-1]
            yield f"{name} longer", (*value, value[-1])
        for i, entry in enumerate(value):
            for place, other in changed(entry, f"{name}[{i}]"):
                yield place, (*value[:i], other, *value[i + 1 :])
    elif isinstance(value, Mapping):
        yield f"{name} with another entry", {**value, "another": 1}
        for key, entry in value.items():
            yield f"{name} without {key}", {k: v for k, v in value.items() if k != key}
            for place, other in changed(entry, f"{name}[{key}]"):
                yield place, {**value, key: other}
    elif isinstance(value, list):
        yield name, [*value, "another"]
    elif value is None:
        yield name, 1
    elif isinstance(value, bool):
        yield name, not value
    elif isinstance(value, (int, float)):
        yield name, value + 1
    elif isinstance(value, str):
        yield name, value + "x"
    else:
        pytest.fail(f"{name} is a {type(value).__name__}: say here how to change it")


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_field_of_the_subject_is_part_of_the_key(name: str) -> None:
    record = record_of(subject=SUBJECTS[name])
    subjects = {record.subject.key: "nothing changed"}
    keys = {record.key}
    for place, other in changed(record.subject, "subject"):
        assert other.key not in subjects, f"{place} has the key of {subjects[other.key]}"
        subjects[other.key] = place
        key = replace(record, subject=other).key
        assert key not in keys, place
        keys.add(key)


def test_these_subjects_have_every_class_that_is_in_a_key() -> None:
    places = {place for subject in SUBJECTS.values() for place, _ in changed(subject, "")}
    expected = {
        "": Subject,
        ".statistics": Statistics,
        ".workload": Workload,
        ".workload.epilogue": Epilogue,
        ".workload.epilogue.ops[0]": EpilogueOp,
        ".workload.epilogue.ops[0].inputs[0]": EpilogueRef,
    }
    wanted = {f"{where}.{f.name}" for where, kind in expected.items() for f in fields(kind)}
    for geometry in (MatmulGeometry, Conv2dGeometry):
        wanted |= {f".workload.geometry.{f.name}" for f in fields(geometry)}
    assert not {want for want in wanted if not any(place.startswith(want) for place in places)}


def test_kernel_and_configuration_are_part_of_the_key() -> None:
    record = record_of()
    keys = {record.key, replace(record, kernel="dense_panels").key}
    others = [config for _, config in changed(CONFIG, "config")]
    keys |= {replace(record, config=config).key for config in others}
    assert len(keys) == 2 + len(others)


def test_what_was_measured_is_no_part_of_the_key() -> None:
    record = record_of()
    in_key = {"subject", "kernel", "config"}
    for f in fields(TuningRecord):
        if f.name not in in_key:
            for place, other in changed(getattr(record, f.name), f.name):
                assert replace(record, **{f.name: other}).key == record.key, place


def test_the_order_of_entries_is_no_part_of_the_key() -> None:
    target = dict(reversed(MATMUL.target.items()))
    record = record_of(subject=replace(MATMUL, target=target))
    config = dict(reversed(CONFIG.items()))
    assert replace(record, config=config).key == record_of().key
    assert record_key(MATMUL, "register_tile", MappingProxyType(CONFIG)) == record_of().key


# Digests.


def test_one_element_the_type_and_the_shape_change_a_weights_digest() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    other = weight.copy()
    other[5, 7] = np.nextafter(other[5, 7], np.float32(9))
    zeros = np.zeros((6, 8), np.float32)
    weights = [
        weight,
        other,
        weight.reshape(8, 6),
        weight.reshape(-1),
        weight.reshape(6, 8, 1, 1),
        weight.view(np.int32),
        weight.astype(np.float64),
        weight.astype(">f4"),
        zeros,
        -zeros,
        zeros.astype(np.float64)[:, :4],
        zeros[:0],
        zeros[:, :0],
    ]
    assert len({weight_digest(w) for w in weights}) == len(weights)


@pytest.mark.parametrize("shape", [(6, 8), (4, 3, 3, 2), (1,), (0, 3)])
def test_where_elements_lie_in_memory_does_not_change_a_weights_digest(
    shape: tuple[int, ...],
) -> None:
    weight = np.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    wide = np.zeros((*shape, 2), np.float32)
    wide[..., 0] = weight
    read_only = weight.copy()
    read_only.flags.writeable = False
    for same in (np.asfortranarray(weight), wide[..., 0], read_only, weight[...]):
        assert weight_digest(same) == weight_digest(weight)


def test_statistics_are_those_of_the_profile() -> None:
    rng = np.random.default_rng(0)
    profile = profile_weight((rng.random((48, 64)) < 0.1).astype(np.float32))
    statistics = Statistics.of(profile)
    assert (statistics.rows, statistics.columns) == (48, 64)
    assert statistics.density == pytest.approx(profile.density, abs=1e-6)
    assert statistics.row_cv == pytest.approx(profile.row_nnz.cv, abs=1e-4)
    assert statistics.column_cv == pytest.approx(profile.column_nnz.cv, abs=1e-4)
    assert statistics.pattern == profile.pattern


def test_the_code_digest_is_that_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        return str(code_digest.__wrapped__())

    assert code_digest() == code_digest() == digest()
    copy = tmp_path / "formats"
    shutil.copytree(Path(str(formats.__file__)).parent, copy)
    monkeypatch.setattr(formats, "__file__", str(copy / "__init__.py"))
    assert digest() == code_digest()
    (copy / "notes.txt").write_text("no source")
    assert digest() == code_digest()
    source = copy / "plain.py"
    text = source.read_text()
    source.write_text(text + "\n")
    assert digest() != code_digest()
    source.write_text(text)
    assert digest() == code_digest()
    source.rename(copy / "plane.py")
    assert digest() != code_digest()
    assert len(digest()) == 24


# Lines that are no records.


def lines_of(count: int) -> list[TuningRecord]:
    return [record_of(trial) for trial in range(1, count + 1)]


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_skipped_and_said(path: Path, cut: int) -> None:
    append_records(path, lines_of(3))
    path.write_bytes(path.read_bytes()[:-cut])
    read = read_records(path)
    whole = 3 if cut == 1 else 2
    assert read.records == tuple(lines_of(3)[:whole])
    torn = (f"line 3 of '{path}' is torn and was skipped",)
    assert read.skipped == (() if cut == 1 else torn)


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_what_is_appended_behind_a_torn_line_stands_on_a_line_of_its_own(
    path: Path, cut: int
) -> None:
    append_records(path, lines_of(3))
    torn = path.read_bytes()[:-cut]
    path.write_bytes(torn)
    append_records(path, [])
    append_records(path, [record_of(4)])
    append_records(path, [record_of(5)])
    read = read_records(path)
    assert path.read_bytes().startswith(torn + b"\n")
    kept = [1, 2, 3, 4, 5] if cut == 1 else [1, 2, 4, 5]
    assert [record.trial for record in read.records] == kept
    if cut > 1:
        assert read.skipped == (f"line 3 of '{path}' is no record (not JSON) and was skipped",)


def test_a_file_of_one_torn_line_holds_nothing_and_is_no_error(path: Path) -> None:
    append_records(path, [record_of()])
    path.write_bytes(path.read_bytes()[:-100])
    assert read_records(path).records == ()
    assert read_records(path).skipped == (f"line 1 of '{path}' is torn and was skipped",)


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = plain()
    change(data)
    return json.dumps(data).encode()


def plain() -> dict[str, Any]:
    """Return the line of a record as plain data."""
    subject = json.loads(json.dumps(MATMUL, default=lambda o: vars(o)))
    body = {f.name: getattr(record_of(), f.name) for f in fields(TuningRecord)}
    return {"version": 1, "key": record_of().key, **body, "subject": subject}


EDITED = "its key does not fit its fields: it was edited"
NO_RECORDS: dict[str, tuple[bytes, str]] = {
    "words": (b"hello", "not JSON"),
    "half a record": (edited(lambda d: None)[:90], "not JSON"),
    "no text": (b"\xff\xfe\x00", "not JSON"),
    "brackets without end": (b"[" * 100_000, "not JSON"),
    "a number without end": (b"1" * 10_000, "not JSON"),
    "a list": (b"[1, 2]", "not an object"),
    "a number": (b"3", "not an object"),
    "null": (b"null", "not an object"),
    "nothing in it": (b"{}", "version None; this program reads 1"),
    "another version": (edited(lambda d: d.update(version=2)), "version 2; this program reads 1"),
    "no subject": (edited(lambda d: d.pop("subject")), "a field is missing or wrong: 'subject'"),
    "no kernel": (edited(lambda d: d.pop("kernel")), "a field is missing or wrong: .*kernel"),
    "no configuration": (edited(lambda d: d.pop("config")), "a field is missing .*config"),
    "no status": (edited(lambda d: d.pop("status")), "a field is missing or wrong: .*status"),
    "no key": (edited(lambda d: d.pop("key")), EDITED),
    "no workload": (edited(lambda d: d["subject"].pop("workload")), "a field is missing .*workl"),
    "no geometry": (
        edited(lambda d: d["subject"]["workload"].update(geometry=None)),
        "a field is missing or wrong",
    ),
    "a size too many": (
        edited(lambda d: d["subject"]["workload"]["geometry"].update(q=3)),
        "a field is missing or wrong: .*'q'",
    ),
    "another operator": (
        edited(lambda d: d["subject"]["workload"].update(op="conv2d")),
        "a field is missing or wrong",
    ),
    "the subject is text": (edited(lambda d: d.update(subject="s")), "a field is missing or wr"),
    "unknown status": (edited(lambda d: d.update(status="fine")), "unknown status 'fine'"),
    "the configuration is a list": (edited(lambda d: d.update(config=[1])), "a field is missing"),
    "the kernel is a number": (edited(lambda d: d.update(kernel=3)), "value of the field 'kernel'"),
    "no number": (edited(lambda d: d.update(us=math.nan)), "nan is no time"),
    "less than no time": (edited(lambda d: d.update(us=-1.0)), "-1.0 is no time"),
    "no time at all": (edited(lambda d: d.update(us=0)), "0 is no time"),
    "eternity": (edited(lambda d: d.update(high_us=math.inf)), "inf is no time"),
    "a time in words": (edited(lambda d: d.update(low_us="1")), '"1" is no value of the field'),
    "true as a time": (edited(lambda d: d.update(us=True)), "true is no value of the field"),
    "a trial in words": (
        edited(lambda d: d.update(trial="first")),
        "\"first\" is no value of the field 'trial'",
    ),
    "half a sample": (edited(lambda d: d.update(samples=0.5)), "0.5 is no value of the field"),
    "a message that is a list": (
        edited(lambda d: d.update(message=[])),
        "a list is no value of the field 'message'",
    ),
    "edited kernel": (edited(lambda d: d.update(kernel="gemv")), EDITED),
    "edited configuration": (edited(lambda d: d["config"].update(mr=5)), EDITED),
    "edited machine": (edited(lambda d: d["subject"].update(machine="mine")), EDITED),
    "edited threads": (edited(lambda d: d["subject"]["workload"].update(threads=9)), EDITED),
    "edited key": (edited(lambda d: d.update(key="0" * 24)), EDITED),
}


def test_the_line_that_is_edited_here_is_a_record_before(path: Path) -> None:
    path.write_bytes(edited(lambda d: None))
    assert read_records(path).records == (record_of(),)


@pytest.mark.parametrize("what", NO_RECORDS)
def test_a_line_that_is_no_record_is_skipped_with_its_reason(path: Path, what: str) -> None:
    line, words = NO_RECORDS[what]
    append_records(path, [record_of(1)])
    with path.open("ab") as stream:
        stream.write(line + b"\n")
    append_records(path, [record_of(2)])
    read = read_records(path)
    assert [record.trial for record in read.records] == [1, 2]
    (sentence,) = read.skipped
    assert sentence.startswith(f"line 2 of '{path}' is no record (")
    assert sentence.endswith(") and was skipped") and "\n" not in sentence
    assert re.search(words, sentence), sentence


def paths_of(data: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List the places in plain data."""
    entries: Any = ()
    if isinstance(data, dict):
        entries = data.items()
    elif isinstance(data, list):
        entries = enumerate(data)
    for key, value in entries:
        yield (*prefix, key)
        yield from paths_of(value, (*prefix, key))


PLACES = sorted(paths_of(json.loads(edited(lambda d: None))), key=str)
NUMBERS = (True, -1, 0.5, 10**30, math.inf, -math.inf, math.nan)
ODD: tuple[Any, ...] = (*NUMBERS, None, "", "x", [], [[1]], {})


@settings(max_examples=100)
@given(place=st.sampled_from(PLACES), odd=st.sampled_from(ODD))
def test_an_odd_value_anywhere_in_a_line_is_skipped_or_harmless(
    place: tuple[Any, ...], odd: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = json.loads(edited(lambda d: None))
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = odd
    path = tmp_path_factory.mktemp("odd") / "r.jsonl"
    path.write_text(json.dumps(data) + "\n")
    read = read_records(path)
    shutil.rmtree(path.parent)
    assert len(read.records) + len(read.skipped) == 1
    for record in read.records:
        assert record.key == record_of().key
        assert type(record.trial) is type(record.samples) is int
        assert isinstance(record.message, str) and isinstance(record.when, str)
        assert all(t is None or 0 < t < math.inf for t in (record.us, record.low_us))


@settings(max_examples=40)
@given(content=st.binary(max_size=60), depth=st.integers(0, 3000))
def test_any_bytes_are_read_or_refused_in_a_sentence(
    content: bytes, depth: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "r.jsonl"
    nested = edited(lambda d: d["subject"].update(target={"a": "?"}))
    deep = nested.replace(b'"?"', b"[" * depth + b"]" * depth)
    path.write_bytes(content + b"\n" + deep + b"\n" + edited(lambda d: None))
    assert read_records(path).records == (record_of(),)
    shutil.rmtree(path.parent)


def test_empty_lines_are_no_news(path: Path) -> None:
    append_records(path, lines_of(2))
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n\r\n  \n"))
    assert read_records(path).records == tuple(lines_of(2))
    assert read_records(path).skipped == ()


def test_a_file_of_several_lines_without_a_record_is_refused(path: Path) -> None:
    path.write_text("# a title\n\nsome words\n")
    with pytest.raises(RecordError, match=r"r'? ?.*holds no tuning records: line 1 .*not JSON"):
        read_records(path)


# Files that cannot be read or written.


def test_a_file_that_is_missing_is_an_error_unless_it_may_be(path: Path) -> None:
    with pytest.raises(RecordError, match=r"there is no file '.*records\.jsonl' of tuning records"):
        read_records(path)
    read = read_records(path, missing_ok=True)
    assert (read.records, read.skipped) == ((), ())
    assert not path.exists()


def test_an_empty_file_holds_nothing(path: Path) -> None:
    append_records(path, [])
    assert path.read_bytes() == b""
    assert read_records(path).records == ()


@pytest.mark.parametrize("missing_ok", [True, False])
def test_a_folder_cannot_be_read(tmp_path: Path, missing_ok: bool) -> None:
    with pytest.raises(RecordError, match="cannot be read: Is a directory"):
        read_records(tmp_path, missing_ok=missing_ok)


def test_a_path_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for place, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "nowhere" / "r.jsonl", "No such file or directory"),
    ):
        with pytest.raises(RecordError, match=f"'{place}' cannot be written: {words}"):
            append_records(place, [record_of()])


def test_a_disk_that_fills_up_is_an_error_and_leaves_whole_records(path: Path) -> None:
    append_records(path, lines_of(3))
    before = path.read_bytes()
    code = (
        "import resource, sys\n"
        "from tvm_sparse.records import append_records, read_records\n"
        "records = read_records(sys.argv[1]).records\n"
        "limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "append_records(sys.argv[1], records[:1])\n"
    )
    limit = str(len(before) + 100)
    done = subprocess.run(
        [sys.executable, "-c", code, path, limit], capture_output=True, text=True, check=False
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != int(limit)
    assert "RecordError" in done.stderr and "cannot be written: " in done.stderr
    assert path.read_bytes() == before


# Several writers.

WRITER = """
import sys
from dataclasses import replace
from tvm_sparse.records import append_records, read_records

record = read_records(sys.argv[1]).records[0]
trial, step, last = map(int, sys.argv[3:])
print("ready", flush=True)
sys.stdin.readline()
while trial <= last:
    # Lines of many lengths, some longer than a page.
    record = replace(record, trial=trial, message="x" * (trial * 37 % 6000))
    append_records(sys.argv[2], [record])
    trial += step
"""


def writer(tmp_path: Path, path: Path, first: int, step: int, last: int) -> subprocess.Popen[str]:
    """Start a process that waits for a line, then appends a record every `step` trials."""
    model = tmp_path / "model.jsonl"
    if not model.exists():
        append_records(model, [record_of()])
    numbers = [str(n) for n in (first, step, last)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(model), str(path), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def let_go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_two_writers_lose_nothing_and_mix_nothing(tmp_path: Path, path: Path) -> None:
    processes = [writer(tmp_path, path, first, 2, 400) for first in (1, 2)]
    let_go(*processes)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    read = read_records(path)
    assert read.skipped == ()
    assert sorted(record.trial for record in read.records) == list(range(1, 401))
    odd = [record.trial for record in read.records if record.trial % 2]
    assert odd == sorted(odd)


def test_a_writer_that_is_killed_tears_its_last_line_at_most(tmp_path: Path, path: Path) -> None:
    processes = [writer(tmp_path, path, 1, 1, 10**9) for _ in range(3)]
    for number, process in enumerate(processes):
        size = path.stat().st_size if path.exists() else 0
        let_go(process)
        deadline = time.monotonic() + 20
        while not path.exists() or path.stat().st_size < size + 60_000 * (number + 1):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    read = read_records(path)
    assert len(read.skipped) <= len(processes)
    starts = [i for i, record in enumerate(read.records) if record.trial == 1]
    runs = [read.records[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert len(runs) == len(processes)
    for run in runs:
        assert [record.trial for record in run] == list(range(1, len(run) + 1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_digest_tells_half_precision_weights_apart(dtype):
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    half = weight.astype(numpy_dtype(dtype))
    changed = half.copy()
    changed[2, 1] += 1
    digests = [weight_digest(w) for w in (weight, half, half.astype(np.float32), changed, half.T)]
    assert digests[0] == digests[2]
    assert len(set(digests)) == 4
