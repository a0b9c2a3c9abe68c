"""Calibration: what this machine's cores can do, and what the cost model's events cost on them.

Some sixty seconds of measuring on a new machine make estimates speak of it, and not of the machine
that the table of prices was fitted on. The result is a small JSON file, which plans read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..cpu_features import machine_identity, missing_features, required_features
from ..errors import TargetError, one_sentence
from ..files import home_folder, write_text
from ..plain_data import build, parse_json
from ..profile import SparsityProfile, profile_weight
from ..progress import SILENT, Progress
from ..records import RecordFile, code_digest
from ..schedules.base import Config
from ..schedules.lookup import DENSE_FORMATS, template_named
from ..schedules.x86.cost import PRICE_NAMES, prices_of
from ..schedules.x86.metaschedule import METASCHEDULE
from ..schedules.x86.templates import TEMPLATES
from ..targets import TargetLike, X86Machine, resolve_target, target_data, x86_machine
from ..workload import Conv2dGeometry, MatmulGeometry, Workload
from .core_speed import CoreSpeed, call_microseconds, measure_core
from .kernel_times import build_timer, shuffled
from .prices import Errors, Sample, events_of, fit_prices, leave_one_group_out

# Counts up when events change their meaning: prices of another version say nothing.
VERSION = 1

# Small enough for L1 and L2, long enough for a clock: about 50 us a call.
_CLOCK = Workload("matmul", MatmulGeometry(192, 192, 192))
_CLOCK_ROUNDS = 30
# What one vector multiply-add of that kernel takes, packing included, by how many are issued a
# cycle.
_CYCLES_PER_FMA: Mapping[int, float] = {2: 0.56, 1: 1.09}

# Features out, features in, tokens: few to many tokens, wide and tall weights, large activations.
_MATMULS = (
    (512, 512, 128),
    (1024, 256, 64),
    (256, 1024, 192),
    (768, 768, 16),
    (1024, 512, 1),
    (768, 1024, 1),
    (512, 768, 4),
    (768, 512, 8),
    (64, 256, 3136),
    (1536, 384, 32),
    (384, 1536, 100),
)
# Channels in, channels out, rows of pixels, kernel, stride.
_CONVS = (
    (64, 64, 56, 3, 1),
    (128, 128, 14, 3, 1),
    (256, 256, 7, 3, 1),
    (64, 128, 28, 3, 2),
    (64, 256, 56, 1, 1),
    (256, 64, 28, 1, 1),
    (512, 256, 14, 1, 1),
    (256, 1024, 7, 1, 1),
    (256, 512, 28, 1, 2),
)
_DENSITIES = (0.5, 0.3, 0.1, 0.05, 0.02)
# Of each layer and template, so many configurations; of each sparse one, so many densities.
_CONFIGS = 2
_DENSITIES_EACH = 3

# Unevenness of rows and columns: the sigma of the logarithm of their scales, as in trained weights.
_SPREAD = 0.15

# Compiling a kernel takes as long as measuring it at so many densities.
_COMPILING = 1.0

# What is known of a price before it is measured, as a share of a kernel's time.
_PRIOR = 0.1


@dataclass(frozen=True)
class Calibration:
    """What was measured of a machine.

    Attributes
    ----------
    machine : str
        `cpu_features.machine_identity` of it.
    target : mapping
        TVM's description of what the kernels were compiled for.
    date : str
        Date and time, UTC.
    gigahertz : float
        Clock by the time of a dense kernel.
    core : CoreSpeed
        What one core can do.
    prices : mapping of str to float
        Cycles per event of the cost model.
    samples : int
        Kernels that were measured.
    error, error_all : float or None
        Median relative error of estimates for shapes that the prices were not fitted to: of the
        best kernel's time, and of every kernel's. None where there were too few.
    """

    machine: str
    target: Mapping[str, Any]
    date: str
    gigahertz: float
    core: CoreSpeed
    prices: Mapping[str, float] = field(repr=False)
    samples: int
    error: float | None
    error_all: float | None

    def apply(self, machine: X86Machine) -> X86Machine:
        """Give a machine these prices."""
        return replace(machine, prices=tuple(sorted(self.prices.items())))

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"

    def __str__(self) -> str:
        core = self.core
        rows = [
            ("float32 multiply-adds", f"{core.fma_gflops:8.1f} GFLOP/s a core"),
            ("reading L1", f"{core.l1_gbytes:8.1f} GB/s"),
            ("reading L2", f"{core.l2_gbytes:8.1f} GB/s"),
            ("reading L3", f"{core.l3_gbytes:8.1f} GB/s"),
            ("reading memory", f"{core.memory_gbytes:8.1f} GB/s"),
            ("starting threads", "one core" if core.fork_us is None else f"{core.fork_us:8.1f} us"),
            ("kernels measured", f"{self.samples:6d}"),
        ]
        if self.error is not None and self.error_all is not None:
            errors = f"{100 * self.error:8.1f} % (best kernel), {100 * self.error_all:.1f} % (all)"
            rows.append(("error on new shapes", errors))
        title = f"{self.machine}, for {self.target.get('mcpu', 'x86')}, {self.date}"
        return "\n".join([title, *(f"  {name:22s} {value}" for name, value in rows)])


def calibrate(
    target: TargetLike = "native",
    seconds: float = 60.0,
    threads: int | None = None,
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
    records: RecordFile | None = None,
) -> Calibration:
    """Measure this machine, and write what was found where plans look for it.

    Parameters
    ----------
    target : str, mapping or tvm.target.Target
        What kernels are compiled for; this machine must be able to run it.
    seconds : float
        About how long to measure: the kernels that tell most come first.
    threads : int, optional
        Threads of the parallel loop whose start is timed, two by default.
    progress : Progress, optional
        Shows how far it is.
    path : path, optional
        Where to write instead, `calibration_path` by default.
    records : RecordFile, optional
        Tuning records: what was measured on this machine for this target joins what is measured
        now.

    Raises
    ------
    TargetError
        When this machine cannot run the target's code.
    SparseError
        When the file cannot be written.
    """
    resolved = resolve_target(target)
    machine = x86_machine(resolved, 1)
    missing = missing_features(required_features(resolved))
    if missing:
        raise TargetError(f"this machine cannot be calibrated for a target with {missing[0]}")
    started = time.perf_counter()
    with (progress or SILENT).phase("calibrate") as phase:
        phase.step("core")
        core = measure_core(resolved, machine.lanes, threads or 2)
        machine = replace(machine, gigahertz=measure_gigahertz(resolved, machine))
        machine = replace(machine, prices=_known_prices(machine, core))
        measured: list[_Measured] = []
        for job in _most_telling_first(_jobs(machine), machine):
            spent = time.perf_counter() - started
            if measured and spent + _typical(measured) > seconds:
                break
            phase.step(job.describe())
            measured += _measure(job, machine, resolved)
        measured += _recorded(records, resolved)
        phase.step("fit")
        prices, errors = _fit(measured, machine)
    enough = len({entry.job.workload for entry in measured}) > 2
    found = Calibration(
        machine=machine_identity(),
        target=target_data(resolved),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        gigahertz=round(machine.gigahertz, 4),
        core=core,
        prices={name: round(price, 4) for name, price in prices.items()},
        samples=len(measured),
        error=round(errors.median_best, 4) if enough else None,
        error_all=round(errors.median, 4) if enough else None,
    )
    place = Path(path) if path is not None else calibration_path(found.machine, resolved)
    if path is None:
        place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, found.to_json())
    return found


def calibration_path(machine: str, target: Any) -> Path:
    """Tell where the calibration of a machine lies.

    In the folder `TVM_SPARSE_HOME`, if that is set, else in the user's cache.

    Parameters
    ----------
    machine : str
        Its `machine_identity`.
    target : tvm.target.Target
        What is compiled for.
    """
    key = json.dumps([machine, target_data(target)], sort_keys=True)
    name = f"machine-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return home_folder() / name


def load_calibration(machine: str, target: Any) -> Calibration | None:
    """Read the calibration of a machine.

    Returns
    -------
    Calibration or None
        None where there is none, or one of another machine, target or version. Damaged ones are
        warned of.
    """
    path = calibration_path(machine, target)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn_of(path, str(error))
        return None
    try:
        data = parse_json(text)
        if data["version"] != VERSION:
            return None
        found = _calibration_from(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        _warn_of(path, f"{type(error).__name__} {error}")
        return None
    if found.machine != machine or dict(found.target) != target_data(target):
        return None
    return found


def measure_gigahertz(target: Any, machine: X86Machine) -> float:
    """Time a dense kernel, and return the clock at which it takes what the cost model says."""
    template = template_named("dense_panels")
    machine = replace(machine, threads=1)
    timer = build_timer(template, _CLOCK, machine, target, template.space(_CLOCK, machine)[0])
    geometry = _CLOCK.geometry
    assert isinstance(geometry, MatmulGeometry)
    seconds = timer.fastest_seconds(_CLOCK_ROUNDS)
    instructions = geometry.macs() / machine.lanes
    return instructions * _CYCLES_PER_FMA[machine.fma_per_cycle] / seconds / 1e9


def _warn_of(path: Path, why: str) -> None:
    warnings.warn(
        one_sentence(
            f"the calibration '{path}' is damaged and was ignored: {why}; calibrate once more"
        ),
        stacklevel=3,
    )


def _calibration_from(data: Mapping[str, Any]) -> Calibration:
    prices = {str(name): _positive(price) for name, price in data["prices"].items()}
    if set(prices) != set(PRICE_NAMES):
        raise ValueError("it has other prices than the cost model")
    # Where there is one core only, starting threads was not measured.
    rates = {name: _positive(rate, empty=name == "fork_us") for name, rate in data["core"].items()}
    return Calibration(
        machine=str(data["machine"]),
        target=dict(data["target"]),
        date=str(data["date"]),
        gigahertz=_positive(data["gigahertz"]),
        core=build(CoreSpeed, rates),
        prices=prices,
        samples=int(data["samples"]),
        error=_share(data["error"]),
        error_all=_share(data["error_all"]),
    )


def _positive(value: Any, *, empty: bool = False) -> Any:
    if empty and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value} is not a number")
    if not 0 < value < math.inf:
        raise ValueError(f"{value} is not a positive number")
    return float(value)


def _share(value: Any) -> float | None:
    return None if value is None else float(value)


def _known_prices(machine: X86Machine, core: CoreSpeed) -> tuple[tuple[str, float], ...]:
    """Return the prices that follow from what the core can do."""
    cycles = machine.gigahertz * 64
    known = {
        "activation_line": cycles / core.l3_gbytes,
        "memory_line": cycles / core.memory_gbytes,
    }
    if core.fork_us is not None:
        known["fork"] = core.fork_us * machine.gigahertz * 1e3
    return tuple(known.items())


@dataclass(frozen=True)
class _Job:
    """One kernel to be compiled, and the densities at which it is measured."""

    workload: Workload
    template: str
    config: Config
    densities: tuple[float, ...]

    def describe(self) -> str:
        """Name it for a progress bar."""
        sizes = self.workload.geometry.weight_shape if self.workload.geometry else ()
        return f"{self.template} {'x'.join(map(str, sizes))}"


@dataclass(frozen=True)
class _Measured:
    """One kernel at one density, its time, and what measuring took."""

    job: _Job
    density: float
    microseconds: float
    seconds: float


def _jobs(machine: X86Machine) -> list[_Job]:
    """List what may be measured: of every layer and template some configurations, each at others.

    The densities take turns, so that every configuration meets some of each kind.
    """
    jobs: list[_Job] = []
    for workload in _workloads():
        for template in TEMPLATES:
            if not template.takes(workload, machine):
                continue
            space = template.space(workload, machine)
            for turn in range(min(_CONFIGS, len(space))):
                # The default first, then another one in every layer.
                index = 0 if not turn else 1 + len(jobs) % (len(space) - 1)
                first = len(jobs) % len(_DENSITIES)
                sparse = tuple(
                    _DENSITIES[(first + 2 * step) % len(_DENSITIES)]
                    for step in range(_DENSITIES_EACH)
                )
                densities = (1.0,) if template.format in DENSE_FORMATS else sparse
                jobs.append(_Job(workload, template.name, space[index], densities))
    return jobs


def _workloads() -> list[Workload]:
    found = [Workload("matmul", MatmulGeometry(m, k, n)) for m, k, n in _MATMULS]
    for ic, oc, size, kernel, stride in _CONVS:
        geometry = Conv2dGeometry(
            1,
            ic,
            size,
            size,
            oc,
            (kernel, kernel),
            strides=(stride, stride),
            padding=(kernel // 2,) * 4,
        )
        found.append(Workload("conv2d", geometry))
    return found


def _most_telling_first(jobs: Sequence[_Job], machine: X86Machine) -> list[_Job]:
    """Order jobs so that each tells most, for the time it takes, of what those before left open.

    Greedy D-optimal design: the next job is the one that adds most to the logarithm of the
    determinant of the information matrix (V. V. Fedorov, "Theory of Optimal Experiments", 1972).
    """
    prices = prices_of(machine)
    paid = np.array([getattr(prices, name) for name in PRICE_NAMES])
    rows = []
    for job in jobs:
        counts = [_events(job, density, machine) for density in job.densities]
        cycles = np.array([[c.get(name, 0.0) for name in PRICE_NAMES] for c in counts]) * paid
        rows.append(cycles / cycles.sum(axis=1, keepdims=True))
    # What is not known yet of each price: the inverse of the information.
    unknown = np.eye(len(PRICE_NAMES)) / _PRIOR**2
    left, ordered = list(range(len(jobs))), []
    while left:
        gains = [
            np.linalg.slogdet(np.eye(len(rows[i])) + rows[i] @ unknown @ rows[i].T)[1]
            / (_COMPILING + len(rows[i]))
            for i in left
        ]
        best = left.pop(int(np.argmax(gains)))
        ordered.append(jobs[best])
        seen = unknown @ rows[best].T
        unknown -= seen @ np.linalg.inv(np.eye(len(rows[best])) + rows[best] @ seen) @ seen.T
    return ordered


def _measure(job: _Job, machine: X86Machine, target: Any) -> list[_Measured]:
    started = time.perf_counter()
    template = template_named(job.template)
    timer = build_timer(template, job.workload, machine, target, job.config, _call_us(target))
    found = []
    for density in job.densities:
        us = timer.microseconds(shuffled(_weight(job.workload, density)))
        now = time.perf_counter()
        found.append(_Measured(job, density, us, now - started))
        started = now
    return found


def _recorded(records: RecordFile | None, target: Any) -> list[_Measured]:
    """Take over what tuning measured on one thread, by kernels that the cost model describes.

    A record tells how dense its weight was, not where its nonzeros lay: those are drawn again.
    """
    latest = {record.key: record for record in records.records} if records else {}
    machine, code, data = machine_identity(), code_digest(), target_data(target)
    found = []
    for record in latest.values():
        subject = record.subject
        trusted = (subject.machine, subject.code, dict(subject.target)) == (machine, code, data)
        known = [t for t in TEMPLATES if t.name == record.kernel and t.name != METASCHEDULE.name]
        if not (record.ok and trusted and known and subject.workload.threads == 1):
            continue
        dense = known[0].format in DENSE_FORMATS
        density = 1.0 if dense else round(subject.statistics.density, 3)
        job = _Job(subject.workload, record.kernel, record.config, (density,))
        found.append(_Measured(job, density, float(record.us or 0), 0.0))
    return found


@lru_cache(maxsize=4)
def _call_us(target: Any) -> float:
    return call_microseconds(target)


def _typical(measured: Sequence[_Measured]) -> float:
    """Guess the seconds of a job."""
    jobs = len({id(entry.job) for entry in measured})
    return sum(entry.seconds for entry in measured) / jobs


def _fit(measured: Sequence[_Measured], machine: X86Machine) -> tuple[dict[str, float], Errors]:
    """Fit twice: some events depend on prices, where the shorter of two things hides."""
    fitted = machine
    for _ in range(2):
        samples = [
            Sample(
                entry.job.template,
                entry.job.workload,
                _events(entry.job, entry.density, fitted),
                entry.microseconds,
                repr(entry.job.workload.geometry),
                entry.density,
            )
            for entry in measured
        ]
        prices = fit_prices(samples, machine)
        fitted = replace(machine, prices=tuple(prices.items()))
    return prices, leave_one_group_out(samples, machine)


def _events(job: _Job, density: float, machine: X86Machine) -> Mapping[str, float]:
    profile = _profile(job.workload, density)
    return events_of(job.template, job.workload, machine, profile, job.config)


@lru_cache(maxsize=256)
def _profile(workload: Workload, density: float) -> SparsityProfile:
    return profile_weight(_weight(workload, density))


@lru_cache(maxsize=16)
def _weight(workload: Workload, density: float) -> np.ndarray:
    """Draw a weight as formats pack it, and cut it as magnitude pruning does."""
    geometry = workload.geometry
    assert geometry is not None
    rows, columns = geometry.weight_shape
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns), np.float32)
    weight *= np.exp(rng.normal(0, _SPREAD, (rows, 1))).astype(np.float32)
    weight *= np.exp(rng.normal(0, _SPREAD, (1, columns))).astype(np.float32)
    if density < 1:
        cut = np.quantile(np.abs(weight), 1 - density)
        weight[np.abs(weight) < cut] = 0
    return weight
