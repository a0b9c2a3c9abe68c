"""Tune a model: measure kernels on its own weights, and keep what was measured as records."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from .calibration import planned_machine
from .compiler import gpu_identity, load_model, profile_site, with_threads
from .cpu_features import machine_identity, missing_features, processor_name, required_features
from .cuda_toolkit import gpu_here, runs_on
from .errors import TuningError
from .layer_details import shown_config
from .model import Model
from .ops import WeightSite
from .passes.collect_weights import FusedSite, collect_weights
from .planner import decide
from .profile import SparsityProfile
from .progress import SILENT, Progress
from .records import (
    RecordFile,
    Statistics,
    Subject,
    TuningRecord,
    append_records,
    code_digest,
    read_records,
    weight_digest,
)
from .report import LayerReport, Report, Tried
from .schedules.base import matrix_view
from .schedules.lookup import DENSE_FORMATS, template_named, templates_for, tuning_space
from .schedules.x86.metaschedule import METASCHEDULE
from .targets import CudaMachine, Machine, TargetLike, X86Machine, resolve_target, target_data
from .tuning.book import RecordBook, describe_geometry
from .tuning.job import Job, rotation, rotation_on
from .tuning.live import Live, Row
from .tuning.measurer import Candidate, Fleet, Measurer, Outcome, job_folder
from .tuning.metaschedule import search_dense
from .tuning.result import TaskResult, TuningResult
from .tuning.search import Ranked, Search
from .workload import Conv2dGeometry

# Layers whose densities differ by less than this factor share their measurements.
_SAME_DENSITY = 1.2
# Trials that a task gets in one go, before the next one may be worth more.
_BATCH = 8
# Finalists whose times are this close run against each other, this many at most.
_CLOSE = 1.06
_FINALISTS = 3
# The middle half of the times may span this share of the median.
_NOISY = 0.1
# MetaSchedule's trials for all layers that stay dense, as multiples of those of one workload, and
# how few of them find nothing.
_DENSE_SHARE = 2
_FEWEST_DENSE_TRIALS = 8


@dataclass
class Task:
    """One workload, the layers that share it, and the search for its kernel."""

    subject: Subject
    sites: list[FusedSite]
    profile: SparsityProfile
    untuned: Candidate
    search: Search
    reused: int = 0

    @property
    def name(self) -> str:
        """The first layer's."""
        return self.sites[0].site.name

    @property
    def expected_gain(self) -> float:
        """What more trials may save: the time at stake, less with every trial in vain."""
        at_stake = len(self.sites) * (self.search.best_us or math.inf)
        return at_stake * self.search.patience_left**2


def tune(
    source: Any,
    target: TargetLike = "native",
    trials: int = 64,
    records: str | os.PathLike[str] = "records.jsonl",
    tracker: str | None = None,
    *,
    threads: int | None = None,
    seconds: float | None = None,
    dense_trials: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> TuningResult:
    """Search for the fastest kernel of every layer, and keep every measurement.

    Parameters
    ----------
    source
        As for `inspect`.
    target : str, mapping or tvm.target.Target
        "native", a short name, or a TVM target.
    trials : int
        Kernels that each distinct workload may have measured; fewer when nothing promises more.
    records : path
        JSON lines: read first, so that tuning goes on where it stopped, and added to after every
        trial.
    tracker : str, optional
        ``HOST:PORT/KEY``: measure on the machines of that key of a TVM RPC tracker.
    threads : int, optional
        Threads to tune for; by default TVM_NUM_THREADS, else all cores.
    seconds : float, optional
        Stop starting trials after this long.
    dense_trials : int, optional
        Trials that TVM's MetaSchedule may spend on a layer that stays dense: as many as `trials` by
        default, none with 0. All such layers together get at most twice that, shared by the time
        that is at stake.
    shapes : mapping, optional
        Fixes symbolic dimensions, by input name.
    progress : Progress, optional
        Shows what is being done.

    Returns
    -------
    TuningResult
        `str` gives a table, `.records` the data; `compile(..., records=...)` uses the file.

    Raises
    ------
    RecordError
        When the file cannot be read or written.
    TuningError
        When nothing can be measured: the target's code does not run here, or there is no such
        GPU, and there is no tracker, or the tracker has no such machine.
    """
    started = time.perf_counter()
    if trials < 1:
        raise TuningError(f"{trials} trials tune nothing; 1 or more are needed")
    model = load_model(source, shapes)
    resolved = resolve_target(target)
    machine = planned_machine(resolved, threads)
    fleet = Fleet.parse(tracker) if tracker else None
    identity = _identity(resolved, machine, fleet)
    kept = read_records(records, missing_ok=True)
    append_records(records, [])
    book = RecordBook(kept, target_data(resolved), identity, tvm.__version__)
    tasks = find_tasks(model, resolved, machine, identity, trials, book, kept)
    session = _Session(model, machine, resolved, tasks, Path(records))
    end = math.inf if seconds is None else time.monotonic() + seconds
    dense_trials = trials if dense_trials is None else dense_trials
    with Measurer(machine.threads, fleet) as measurer:
        session.run(measurer, end, progress or SILENT)
        session.tune_dense(measurer, dense_trials, end, progress or SILENT)
    return session.result(kept, time.perf_counter() - started)


def _identity(target: Any, machine: Machine, fleet: Fleet | None) -> str:
    """Name what is measured on, as records hold it.

    Raises
    ------
    TuningError
        When the target's code runs neither here nor on what a tracker lends.
    """
    if isinstance(machine, CudaMachine):
        return _gpu_identity(machine, fleet)
    _check_runs_here(target, machine, fleet)
    return f"fleet:{fleet.key}" if fleet else machine_identity()


def _gpu_identity(machine: CudaMachine, fleet: Fleet | None) -> str:
    if fleet is not None:
        # A tracker that is not there is said first, and how many machines it has.
        fleet.count()
        return f"fleet:{fleet.key} ({fleet.gpu()})"
    found = gpu_here()
    ways = (
        "tune on a machine with such a GPU, or name the TVM RPC tracker of one "
        "(--tracker HOST:PORT --key KEY)"
    )
    if found is None:
        raise TuningError(f"kernels for {machine.arch} are measured on an NVIDIA GPU; {ways}")
    name, capability = found
    if not runs_on(machine.arch, capability):
        raise TuningError(f"the GPU here ({name}) does not run code for {machine.arch}; {ways}")
    return gpu_identity(name, capability)


def _check_runs_here(target: Any, machine: X86Machine, fleet: Fleet | None) -> None:
    missing = missing_features(required_features(target))
    if missing and fleet is None:
        raise TuningError(
            f"code for {machine.mcpu} does not run on this machine ({processor_name()} lacks "
            f"{', '.join(missing[:3])}); measure on one that has it, through a tracker"
        )


def find_tasks(
    model: Model,
    target: Any,
    machine: Machine,
    identity: str,
    trials: int,
    book: RecordBook,
    kept: RecordFile,
) -> list[Task]:
    """Group the layers that can share measurements, and rank what each group may try."""
    groups: dict[Any, list[tuple[FusedSite, SparsityProfile, str]]] = {}
    for fused in collect_weights(model):
        site = with_threads(fused.site, machine)
        if site.refusal or site.workload.geometry is None:
            continue
        if not any(template.takes(site.workload, machine) for template in templates_for(machine)):
            continue
        profile = profile_site(model, site)
        digest = weight_digest(model.params[site.param])
        step = round(math.log(max(profile.density, 1e-6)) / math.log(_SAME_DENSITY))
        key = (site.workload, step, profile.pattern)
        entry = FusedSite(site, fused.data, fused.fused), profile, digest
        groups.setdefault(key, []).append(entry)
    return [
        _task(group, target, machine, identity, trials, book, kept) for group in groups.values()
    ]


def _task(
    group: Sequence[tuple[FusedSite, SparsityProfile, str]],
    target: Any,
    machine: Machine,
    identity: str,
    trials: int,
    book: RecordBook,
    kept: RecordFile,
) -> Task:
    site, profile = group[0][0].site, group[0][1]
    subject = Subject(
        workload=site.workload,
        weights=tuple(dict.fromkeys(digest for _, _, digest in group)),
        statistics=Statistics.of(profile),
        target=target_data(target),
        machine=identity,
        code=code_digest(),
        tvm=tvm.__version__,
    )
    decision = decide(site, profile, machine)
    untuned = Candidate(decision.kernel, decision.config)
    hints = [
        Candidate(hint.record.kernel, dict(hint.record.config))
        for hint in book.similar(site.workload, subject.statistics)[:2]
    ]
    ranked = rank(site, profile, machine)
    known = {entry.candidate.key for entry in ranked}
    # TVM's own kernel, which the plan may have chosen on a GPU, is none of the candidates.
    first = [] if untuned.kernel == "tvm" else [untuned]
    first += [hint for hint in hints if hint.key in known]
    task = Task(subject, [g[0] for g in group], profile, untuned, Search(ranked, first, trials))
    _resume(task, kept)
    return task


def rank(site: WeightSite, profile: SparsityProfile, machine: Machine) -> list[Ranked]:
    """List every candidate of a layer with its estimate, the fastest first."""
    found = []
    for template in templates_for(machine):
        if not template.takes(site.workload, machine):
            continue
        if profile.nnz == profile.size and template.format not in DENSE_FORMATS:
            continue
        for config in tuning_space(template, site.workload, machine):
            estimate = template.estimate(site.workload, machine, profile, config)
            if math.isfinite(estimate):
                found.append(Ranked(Candidate(template.name, dict(config)), estimate))
    return sorted(found, key=lambda entry: entry.estimate)


def _resume(task: Task, kept: RecordFile) -> None:
    """Take in what was measured before, as if it had been measured now."""
    key = task.subject.key
    latest = {r.key: r for r in kept.records if r.subject.key == key}
    for record in sorted(latest.values(), key=lambda r: r.trial):
        outcome = Outcome(**{field.name: getattr(record, field.name) for field in fields(Outcome)})
        task.search.tell(Candidate(record.kernel, dict(record.config)), outcome)
        task.reused += 1


class _Session:
    """Tuning of one model, from the first trial to the summary."""

    def __init__(
        self, model: Model, machine: Machine, target: Any, tasks: Sequence[Task], path: Path
    ) -> None:
        self.model, self.machine, self.target = model, machine, target
        self.tasks, self.path = tasks, path
        self.records: list[TuningRecord] = []
        self.notes: list[str] = []

    def run(self, measurer: Measurer, end: float, progress: Progress) -> None:
        """Give trials to the task that promises most, until none promises anything."""
        batch = max(_BATCH, 2 * measurer.width)
        with Live(self._rows, progress) as live:
            while time.monotonic() < end:
                open_tasks = [task for task in self.tasks if not task.search.done]
                if not open_tasks:
                    break
                task = max(open_tasks, key=lambda t: t.expected_gain)
                with self._job(task) as folder:
                    self._measure(task, folder, task.search.propose(batch), measurer, live)
            for task in self.tasks:
                if time.monotonic() < end:
                    self._race(task, measurer)

    def _rows(self) -> list[Row]:
        return [
            Row(
                task.name,
                task.search.best_us,
                _second(task.search.best_of(dense=True)),
                len(task.search.measured),
                task.search.trials,
                task.search.done,
            )
            for task in self.tasks
        ]

    @contextmanager
    def _job(self, task: Task) -> Iterator[Path]:
        """Lay out what workers need of a task."""
        first = task.sites[0]
        geometry = task.subject.workload.geometry
        taps = math.prod(geometry.kernel) if isinstance(geometry, Conv2dGeometry) else 1
        weights = [
            matrix_view(self.model.params[fused.site.param], task.subject.workload.op)
            for fused in task.sites
        ]
        count = rotation_on(self.machine, task.profile.nnz, weights[0].itemsize)
        job = Job(
            task.subject.workload,
            self.machine,
            target_data(self.target),
            rotation(weights, taps, count),
            [self.model.params[name].reshape(-1) for name in first.fused.channels],
        )
        with job_folder(job) as folder:
            yield folder

    def _measure(
        self,
        task: Task,
        folder: Path,
        candidates: Sequence[Candidate],
        measurer: Measurer,
        live: Live,
    ) -> None:
        for index, outcome in measurer.measure(folder, candidates):
            task.search.tell(candidates[index], outcome)
            self._keep(task, candidates[index], outcome, len(task.search.measured))
            live.step(task.name)

    def _keep(self, task: Task, candidate: Candidate, outcome: Outcome, trial: int) -> None:
        told = replace(
            outcome,
            message=outcome.message or _noise(outcome),
            seconds=round(outcome.seconds, 3),
        )
        record = TuningRecord(
            task.subject,
            candidate.kernel,
            dict(candidate.config),
            **asdict(told),
            trial=trial,
            when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        append_records(self.path, [record])
        self.records.append(record)

    def _race(self, task: Task, measurer: Measurer) -> None:
        """Time the closest candidates against each other, the untuned plan's among them."""
        search = task.search
        if search.best_us is None or len(search.measured) == task.reused:
            return
        ok = {k: o.us for k, o in search.measured.items() if o.us is not None}
        close = sorted((us, k) for k, us in ok.items() if us <= _CLOSE * search.best_us)
        keys = [k for _, k in close[:_FINALISTS]]
        if task.untuned.key in ok and task.untuned.key not in keys:
            keys.append(task.untuned.key)
        if len(keys) < 2:
            return
        finalists = [search.candidates[k] for k in keys]
        with self._job(task) as folder:
            outcomes = measurer.race(folder, finalists)
        trials = {k: number for number, k in enumerate(search.measured, 1)}
        for candidate, outcome in zip(finalists, outcomes or [], strict=False):
            before = search.measured[candidate.key]
            again = replace(outcome, error_share=before.error_share, seconds=before.seconds)
            search.tell(candidate, again)
            self._keep(task, candidate, again, trials[candidate.key])

    def tune_dense(self, measurer: Measurer, trials: int, end: float, progress: Progress) -> None:
        """Let MetaSchedule search for what stays dense, and keep what it measures as all else."""
        machine = self.machine
        if isinstance(machine, CudaMachine):
            if trials:
                self.notes.append(
                    "what stays dense on a GPU keeps TVM's own schedule: MetaSchedule searches "
                    "for processors only"
                )
            return
        shares = _dense_shares([t for t in self.tasks if _stays_dense(t, machine)], trials)
        with progress.phase("MetaSchedule", total=sum(share for _, share in shares)) as phase:
            for task, share in shares:
                if time.monotonic() > end:
                    break

                def keep(candidate: Candidate, outcome: Outcome, task: Task = task) -> None:
                    task.search.tell(candidate, outcome)
                    self._keep(task, candidate, outcome, len(task.search.measured))
                    phase.step(task.name)

                # A dense kernel takes the same time with any weight, so that its own will do.
                search_dense(
                    task.subject.workload,
                    self.target,
                    machine,
                    share,
                    seed=_schedules_tried(task),
                    on_outcome=keep,
                    measurer=measurer,
                )

    def result(self, kept: RecordFile, seconds: float) -> TuningResult:
        """Sum up."""
        every = RecordFile((*kept.records, *self.records))
        tasks = sorted((self._summed(task) for task in self.tasks), key=lambda t: -t.weight)
        return TuningResult(
            tuple(tasks),
            every.records,
            self._report(),
            seconds,
            (*kept.skipped, *self.notes),
        )

    def _summed(self, task: Task) -> TaskResult:
        search = task.search
        best = search.best
        winner = search.measured[best.key] if best else None
        untuned = search.measured.get(task.untuned.key)
        return TaskResult(
            layers=tuple(fused.site.name for fused in task.sites),
            shape=describe_geometry(task.subject.workload.geometry),
            density=task.profile.density,
            kernel=_describe(best) if best else "none that runs",
            us=winner.us if winner else None,
            untuned_us=untuned.us if untuned else None,
            dense_us=_second(search.best_of(dense=True)),
            trials=len(search.measured),
            failures=sum(o.us is None for o in search.measured.values()),
            reused=task.reused,
            noisy=bool(winner and _noise(winner)),
            history=tuple(search.history),
        )

    def _report(self) -> Report:
        """Describe the layers with their winners, for the page and for programs."""
        layers = []
        for task in self.tasks:
            best = task.search.best
            if best is None:
                continue
            us = task.search.best_us
            dense = _second(task.search.best_of(dense=True))
            kind = template_named(best.kernel).format
            for fused in task.sites:
                weight: np.ndarray = self.model.params[fused.site.param]
                layers.append(
                    LayerReport(
                        name=fused.site.name,
                        op=fused.site.workload.op,
                        shape=fused.site.weight_shape,
                        dtype=fused.site.workload.dtype,
                        density=task.profile.density,
                        pattern=task.profile.pattern,
                        nnz=task.profile.nnz,
                        format="dense" if kind in DENSE_FORMATS else kind,
                        kernel=best.kernel,
                        config=shown_config(best.config),
                        source="record",
                        reason=f"the fastest of {len(task.search.measured)} measured",
                        measured_us=us,
                        dense_us=dense,
                        bytes_dense=int(weight.nbytes),
                        history=tuple(task.search.history),
                        candidates=_measured(task),
                    )
                )
        return Report(
            self.model.source,
            target=self.machine.name,
            threads=self.machine.threads,
            layers=tuple(layers),
            notes=tuple(self.model.notes),
        )


def _measured(task: Task) -> tuple[Tried, ...]:
    """List the fastest candidate of each kernel for the report."""
    return tuple(
        Tried(template_named(c.kernel).format, c.kernel, shown_config(c.config), us, measured=True)
        for c, us in task.search.best_of_kernels()
    )


def _stays_dense(task: Task, machine: X86Machine) -> bool:
    """Whether a task's fastest kernel multiplies by zeros, and MetaSchedule may do better."""
    best = task.search.best
    return (
        best is not None
        and template_named(best.kernel).format in DENSE_FORMATS
        and bool(METASCHEDULE.takes(task.subject.workload, machine))
    )


def _schedules_tried(task: Task) -> int:
    search = task.search
    return sum(search.candidates[key].kernel == METASCHEDULE.name for key in search.measured)


def _dense_shares(tasks: Sequence[Task], trials: int) -> list[tuple[Task, int]]:
    """Share trials out by the time at stake; what would get too few to find anything gets none."""
    stakes = {task.name: len(task.sites) * (task.search.best_us or 0.0) for task in tasks}
    total = min(_DENSE_SHARE, len(tasks)) * trials
    shares = []
    for task in sorted(tasks, key=lambda t: -stakes[t.name]):
        share = min(trials, round(total * stakes[task.name] / max(sum(stakes.values()), 1e-9)))
        share -= _schedules_tried(task)
        if share >= min(_FEWEST_DENSE_TRIALS, max(trials, 1)):
            shares.append((task, share))
    return shares


def _second(pair: tuple[Candidate, float] | None) -> float | None:
    return None if pair is None else pair[1]


def _noise(outcome: Outcome) -> str:
    if outcome.us is None or outcome.low_us is None or outcome.high_us is None:
        return ""
    spread = (outcome.high_us - outcome.low_us) / max(outcome.us, 1e-9)
    return f"noisy: the middle half spans {100 * spread:.0f} %" if spread > _NOISY else ""


def _describe(candidate: Candidate) -> str:
    hidden = {"multiple", "groups", "trace"}
    shown = {k: v for k, v in candidate.config.items() if k not in hidden}
    if shown.get("threads") == 1:
        shown = {k: v for k, v in shown.items() if k not in ("threads", "parts")}
    return " ".join([candidate.kernel, *(f"{k}={v}" for k, v in shown.items())])
