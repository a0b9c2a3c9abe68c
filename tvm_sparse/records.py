"""Tuning records: what was measured of which kernel, kept as JSON lines.

A line is appended in one write under a lock, so that two writers do not mix and a kill leaves at
most one torn line, which readers skip and name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RecordError, one_sentence
from .plain_data import build, parse_json
from .profile import SparsityProfile
from .workload import (
    Conv2dGeometry,
    Epilogue,
    Geometry,
    MatmulGeometry,
    Workload,
)

VERSION = 1

# Sources among the kernel templates that choose kernels, and make none.
_CHOOSING = frozenset({"cost.py", "lookup.py", "spaces.py"})

# What became of a measurement.
STATUSES = ("ok", "wrong", "failed", "crashed", "timed out")


@dataclass(frozen=True)
class Statistics:
    """What a weight's zeros look like, in the few numbers that decide how fast its kernels are."""

    rows: int
    columns: int
    density: float
    row_cv: float
    column_cv: float
    pattern: str

    @classmethod
    def of(cls, profile: SparsityProfile) -> Statistics:
        """Take them from a profile."""
        return cls(
            rows=profile.shape[0],
            columns=profile.shape[1],
            density=round(profile.density, 6),
            row_cv=round(profile.row_nnz.cv, 4),
            column_cv=round(profile.column_nnz.cv, 4),
            pattern=profile.pattern,
        )


@dataclass(frozen=True)
class Subject:
    """All that a measured time depends on, but the kernel itself.

    Attributes
    ----------
    workload : Workload
        Operator, geometry, type, epilogue and threads.
    weights : tuple of str
        Digests of the weights that were called in rotation.
    statistics : Statistics
        Of the first of them.
    target : mapping
        TVM's description of the target.
    machine : str
        The processor that ran it, or ``fleet:KEY`` for one that a tracker lent.
    code : str
        Digest of the kernel templates' and formats' sources.
    tvm : str
        Version of TVM.
    """

    workload: Workload
    weights: tuple[str, ...]
    statistics: Statistics
    target: Mapping[str, Any]
    machine: str
    code: str
    tvm: str

    @property
    def key(self) -> str:
        """Digest of all fields."""
        return _digest(asdict(self))


@dataclass(frozen=True)
class TuningRecord:
    """One kernel at one configuration, measured or failed.

    Attributes
    ----------
    subject : Subject
        What it was measured on.
    kernel : str
        Name of the template.
    config : mapping
        Its configuration.
    status : str
        "ok", "wrong" (its result was), "failed" (it could not be built), "crashed" or "timed out".
    us, low_us, high_us : float or None
        Median and quartiles of a call in microseconds.
    samples : int
        Measurements behind them.
    error_share : float or None
        Largest error against float64, as a share of its bound.
    message : str
        What went wrong; or that the measurement was noisy.
    trial : int
        Its number among the trials of the subject, from 1 on.
    seconds : float
        What the trial took.
    when : str
        Date and time, UTC.
    """

    subject: Subject
    kernel: str
    config: Mapping[str, Any]
    status: str
    us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples: int = 0
    error_share: float | None = None
    message: str = ""
    trial: int = 0
    seconds: float = 0.0
    when: str = ""

    @property
    def key(self) -> str:
        """What two measurements of the same thing share."""
        return record_key(self.subject, self.kernel, self.config)

    @property
    def ok(self) -> bool:
        """Whether it ran, and rightly."""
        return self.status == "ok" and self.us is not None


@dataclass(frozen=True)
class RecordFile:
    """What a file held.

    Attributes
    ----------
    records : tuple of TuningRecord
        In the order of the file.
    skipped : tuple of str
        A sentence for every line that was no record.
    """

    records: tuple[TuningRecord, ...] = ()
    skipped: tuple[str, ...] = field(default=())


def record_key(subject: Subject, kernel: str, config: Mapping[str, Any]) -> str:
    """Digest everything that a kernel and its time depend on."""
    return _digest({"subject": subject.key, "kernel": kernel, "config": dict(config)})


def weight_digest(weight: np.ndarray) -> str:
    """Digest a weight: its type, shape and every element."""
    digest = hashlib.sha256(f"{weight.dtype} {weight.shape}".encode())
    digest.update(np.ascontiguousarray(weight).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()[:24]


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest the sources that kernels and packed weights are made by."""
    from . import formats, schedules

    digest = hashlib.sha256()
    for package in (formats, schedules):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            if path.name in _CHOOSING:
                continue
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def append_records(path: str | os.PathLike[str], records: Iterable[TuningRecord]) -> None:
    """Add records to a file, whole or not at all, beside other writers.

    Raises
    ------
    RecordError
        When the file cannot be written.
    """
    text = "".join(_to_line(record) for record in records).encode()
    try:
        with open(path, "ab+", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            end = stream.seek(0, os.SEEK_END)
            if end and os.pread(stream.fileno(), 1, end - 1) != b"\n":
                # Another writer was killed in its line: that line stays alone.
                text = b"\n" + text
            try:
                if stream.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                # On a disk that is full only a part was written.
                stream.truncate(end)
                raise
    except OSError as error:
        raise RecordError(f"'{path}' cannot be written: {error.strerror or error}") from None


def read_records(path: str | os.PathLike[str], *, missing_ok: bool = False) -> RecordFile:
    """Read a file of records; lines that are none are skipped and named.

    Raises
    ------
    RecordError
        When the file cannot be read, or holds lines but not one record.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        if missing_ok:
            return RecordFile()
        raise RecordError(f"there is no file '{path}' of tuning records") from None
    except OSError as error:
        raise RecordError(f"'{path}' cannot be read: {error.strerror or error}") from None
    records: list[TuningRecord] = []
    skipped: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_from_line(line))
        except _NotOurs as error:
            torn = number == len(lines)
            what = "is torn" if torn else f"is no record ({error})"
            skipped.append(one_sentence(f"line {number} of '{path}' {what} and was skipped"))
    if skipped and not records and len(skipped) > 1:
        raise RecordError(f"'{path}' holds no tuning records: {skipped[0]}")
    return RecordFile(tuple(records), tuple(skipped))


class _NotOurs(Exception):
    """A line that is no record, and why."""


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _to_line(record: TuningRecord) -> str:
    data = {"version": VERSION, "key": record.key, **asdict(record)}
    return json.dumps(data, separators=(",", ":")) + "\n"


def _from_line(line: bytes) -> TuningRecord:
    try:
        data = parse_json(line)
    except ValueError:
        raise _NotOurs("not JSON") from None
    if not isinstance(data, dict):
        raise _NotOurs("not an object")
    if data.get("version") != VERSION:
        raise _NotOurs(f"version {data.get('version')}; this program reads {VERSION}")
    try:
        known = {f.name for f in fields(TuningRecord)} & data.keys()
        subject = _subject_from(data["subject"])
        record = build(TuningRecord, {**{key: data[key] for key in known}, "subject": subject})
        key = record.key
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _NotOurs(f"a field is missing or wrong: {error}") from None
    _check_values(record)
    if data.get("key") != key:
        raise _NotOurs("its key does not fit its fields: it was edited")
    return record


def _check_values(record: TuningRecord) -> None:
    times = (record.us, record.low_us, record.high_us)
    if record.status not in STATUSES:
        raise _NotOurs(f"unknown status '{record.status}'")
    for value in times:
        if value is not None and not 0 < value < 1e12:
            raise _NotOurs(f"{value} is no time")
    for name in ("samples", "trial"):
        value = getattr(record, name)
        if value < 0:
            raise _NotOurs(f"{value!r} is no number of {name}")


def _subject_from(data: Mapping[str, Any]) -> Subject:
    return Subject(
        workload_from(data["workload"]),
        tuple(str(digest) for digest in data["weights"]),
        _statistics_from(data["statistics"]),
        dict(data["target"]),
        str(data["machine"]),
        str(data["code"]),
        str(data["tvm"]),
    )


def _statistics_from(data: Mapping[str, Any]) -> Statistics:
    found = build(Statistics, data)
    spreads = (found.row_cv, found.column_cv)
    if not (0 <= found.density <= 1 and all(0 <= cv < math.inf for cv in spreads)):
        raise ValueError("the density or a spread is out of range")
    return found


def workload_from(data: Mapping[str, Any]) -> Workload:
    """Read a workload back from the plain data of `dataclasses.asdict`.

    Raises
    ------
    KeyError, TypeError, ValueError
        When a field is missing or wrong.
    """
    return Workload(
        str(data["op"]),
        _geometry_from(str(data["op"]), data["geometry"]),
        str(data["dtype"]),
        build(Epilogue, data["epilogue"]),
        int(data["threads"]),
    )


def _geometry_from(op: str, data: Mapping[str, Any]) -> Geometry:
    found: Geometry = build(MatmulGeometry, data) if op == "matmul" else build(Conv2dGeometry, data)
    for name, value in vars(found).items():
        sizes = value if isinstance(value, tuple) else (value,)
        if name != "padding" and any(isinstance(size, int) and size < 1 for size in sizes):
            raise ValueError(f"{value} is no size of the field '{name}'")
    return found
