"""Decide for every weight which format and kernel it gets, and say why."""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .dtypes import numpy_dtype
from .errors import PlanError, SparseError
from .files import write_text
from .formats import FORMATS
from .ops import WeightSite
from .plain_data import build, parse_json
from .profile import SparsityProfile
from .records import Statistics
from .schedules.base import KernelTemplate
from .schedules.lookup import (
    ALL_TEMPLATES,
    DENSE_FORMATS,
    stock_dense,
    template_named,
    templates_for,
)
from .targets import Machine
from .tuning.book import Hint, RecordBook
from .workload import Workload

VERSION = 1

_KERNELS = frozenset(template.name for template in ALL_TEMPLATES)

# What a configuration that was written by hand may hold.
_LARGEST = 65535

# Keys that follow from the layer or the processor, so that another value is wrong code.
_FIXED: dict[str, tuple[str, ...]] = {
    "dense_panels": ("groups",),
    "gemv": ("mr", "groups"),
    "n_of_m": ("mr",),
    "channel_vectors": ("groups",),
    "compact_channels": ("taps",),
}

# A sparse kernel has to be this much faster by estimate: what that is wrong by in the median
# (benchmarks/fit_cost.py). Near break-even it errs to the advantage of dense kernels.
SPARSE_MARGIN = 0.93

# What was fastest for a similar layer may be this much slower by estimate than the model's own
# choice; less where that was on another machine. A layer as near as this is believed whatever the
# estimate says.
TRUSTED_MARGIN = 1.2
HINT_MARGIN = 1.1
NEARLY_THE_SAME = 0.35


@dataclass(frozen=True)
class Candidate:
    """A kernel that could compute a layer, at its best configuration.

    `measured` tells whether its time is a record's; else the cost model expects it.
    """

    format: str
    kernel: str
    config: Mapping[str, Any]
    expected_us: float
    measured: bool = False


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight.

    Attributes
    ----------
    name : str
        The user's layer name.
    format, kernel : str
        Keys of the tables of formats and templates; kernel "tvm" leaves the operator to TVM's own
        schedule.
    config : mapping
        The kernel's configuration.
    source : str
        "model" (the cost model), "record" or "user".
    reason : str
        Why, in words.
    expected_us, dense_us : float or None
        Estimated microseconds of this kernel, and of the best dense one.
    candidates : tuple of Candidate
        What was compared, the fastest first.
    refusals : mapping of str to str
        Formats that cannot hold the layer, or whose kernels cannot compute it, with the reason.
    """

    name: str
    op: str
    format: str
    kernel: str
    config: Mapping[str, Any]
    source: str
    reason: str
    expected_us: float | None = None
    dense_us: float | None = None
    candidates: tuple[Candidate, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_sparse(self) -> bool:
        """Whether zeros are skipped."""
        return self.kernel != "tvm" and self.format not in DENSE_FORMATS


@dataclass(frozen=True)
class Plan:
    """The decisions for one model on one target; plain data, editable as JSON."""

    target: Mapping[str, Any]
    threads: int
    digest: str
    decisions: tuple[Decision, ...] = field(default=())

    def decision(self, name: str) -> Decision:
        """Look up a layer by name.

        Raises
        ------
        PlanError
            When the plan has no such layer.
        """
        for decision in self.decisions:
            if decision.name == name:
                return decision
        raise PlanError(f"the plan has no layer '{name}'; it was made for another model")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the plan as JSON, and write it to `path` if one is given."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"
        if path is not None:
            try:
                write_text(path, text)
            except SparseError as error:
                raise PlanError(f"the plan cannot be written to '{path}': {error}") from None
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Plan:
        """Read a plan from JSON text or from a file.

        Raises
        ------
        PlanError
            When it cannot be read, is no plan, or lacks a field.
        """
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else None
        if text is None:
            try:
                text = Path(source).read_text()
            # ValueError: what is no UTF-8, and a path with a zero byte.
            except (OSError, ValueError) as error:
                raise PlanError(f"the plan '{source}' cannot be read: {error}") from None
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from None
        return _plan_from(data)

    def __str__(self) -> str:
        sparse = sum(decision.is_sparse for decision in self.decisions)
        lines = [f"plan: {sparse} of {len(self.decisions)} layers sparse, {self.threads} threads"]
        lines += [f"  {d.name}: {d.kernel} ({d.reason})" for d in self.decisions]
        return "\n".join(lines)


def _plan_from(data: Any) -> Plan:
    if not isinstance(data, dict):
        raise PlanError("the plan is not a JSON object")
    if data.get("version") != VERSION:
        raise PlanError(f"the plan has version {data.get('version')}; this program reads {VERSION}")
    entries = data.get("decisions")
    if not isinstance(entries, list):
        raise PlanError("the plan lacks or misspells a field: it has no list of 'decisions'")
    fields = {key: value for key, value in data.items() if key != "version"}
    try:
        plan = build(Plan, {**fields, "decisions": [_decision_from(entry) for entry in entries]})
    except ValueError as error:
        raise PlanError(f"the plan lacks or misspells a field: {error}") from None
    if plan.threads < 1:
        raise PlanError(f"the plan is for {plan.threads} threads; there must be one or more")
    seen = set()
    for decision in plan.decisions:
        _check_decision(decision)
        if decision.name in seen:
            raise PlanError(f"the plan decides twice about the layer '{decision.name}'")
        seen.add(decision.name)
    return plan


def _decision_from(entry: Any) -> Decision:
    try:
        return build(Decision, entry)
    except ValueError as error:
        name = entry.get("name") if isinstance(entry, dict) else None
        where = f"layer '{name}' of the plan" if isinstance(name, str) else "the plan"
        raise PlanError(f"{where} lacks or misspells a field: {error}") from None


def _check_decision(decision: Decision) -> None:
    if decision.kernel == "tvm":
        return
    template = template_named(decision.kernel)
    if template.format != decision.format:
        raise PlanError(
            f"layer '{decision.name}': kernel '{decision.kernel}' reads the format "
            f"'{template.format}', not '{decision.format}'"
        )


def check_config(
    name: str,
    template: KernelTemplate,
    workload: Workload,
    machine: Machine,
    config: Mapping[str, Any],
) -> None:
    """Refuse a configuration that the kernel cannot be built with.

    Raises
    ------
    PlanError
        When a key is missing, unknown or has a value that makes no kernel.
    """
    where = f"layer '{name}': the configuration of '{template.name}'"
    space = template.space(workload, machine)
    if not space:
        _check_trace(where, config)
        return
    usual = space[0]
    for key in [key for key in usual if key not in config]:
        raise PlanError(f"{where} lacks '{key}'; it needs {', '.join(usual)}")
    for key, value in config.items():
        if key == "cluster" and isinstance(value, bool) and template.format == "register_tiled":
            continue
        if key not in usual:
            raise PlanError(f"{where} has no '{key}'; it needs {', '.join(usual)}")
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise PlanError(f"{where} needs a number from 1 to {_LARGEST} as '{key}', not {value}")
        if key in _FIXED.get(template.name, ()) and value != usual[key]:
            raise PlanError(f"{where} has to have {usual[key]} as '{key}' here, not {value}")
    needed = template.check(workload, machine, config)
    if needed:
        raise PlanError(f"{where} {needed}")


def _check_trace(where: str, config: Mapping[str, Any]) -> None:
    """Accept a schedule's steps; whether they apply shows when the kernel is built."""
    if list(config) != ["trace"] or not isinstance(config["trace"], str):
        raise PlanError(f"{where} is a schedule: 'trace' and nothing else, as a record holds it")


def decide(
    site: WeightSite,
    profile: SparsityProfile,
    machine: Machine,
    *,
    force: Mapping[str, str] | None = None,
    forbid: Sequence[str] = (),
    book: RecordBook | None = None,
    digest: str = "",
) -> Decision:
    """Choose a kernel for one weight by its time; dense is a candidate like the others.

    Times are those of the layer's own records. A layer without any is given what the most similar
    recorded one got, and else what the cost model expects to be fastest.

    Parameters
    ----------
    site, profile, machine
        The layer, the zeros of its weight, and the processor.
    force : mapping of str to str
        Layer name or pattern (`fnmatch`) to the format that it must get.
    forbid : sequence of str
        Layer names or patterns that stay dense.
    book : RecordBook, optional
        Tuning records.
    digest : str
        `records.weight_digest` of the weight, which records know it by.

    Raises
    ------
    PlanError
        When a forced format cannot hold the layer.
    """
    if site.refusal or site.workload.geometry is None:
        wanted = _forced(site.name, force)
        if wanted not in (None, "dense"):
            raise PlanError(f"layer '{site.name}' cannot be {wanted}: {site.refusal}")
        return Decision(site.name, site.workload.op, "dense", "tvm", {}, "model", site.refusal)
    estimated, refusals = _candidates(site.workload, profile, machine)
    measured = _measured(site, machine, book, digest)
    if measured and not any(c.format in DENSE_FORMATS for c in measured):
        # TVM's own kernels are not tuned, and so not measured.
        measured += [c for c in estimated if c.kernel == "tvm"]
    choice = _choose(site.name, profile, estimated, refusals, force, forbid, measured)
    if choice is None:
        # What was forced was not measured.
        measured = []
        choice = _choose(site.name, profile, estimated, refusals, force, forbid, measured)
    assert choice is not None
    chosen, source, reason = choice
    candidates = measured or estimated
    if book is not None and source == "model" and profile.nnz < profile.size:
        hinted = _hinted(site, profile, machine, book, chosen)
        if hinted is not None:
            chosen, source, reason = hinted[0], "record", hinted[1]
    best_dense = _fastest([c for c in candidates if c.format in DENSE_FORMATS])
    return Decision(
        name=site.name,
        op=site.workload.op,
        format=chosen.format if chosen else "dense",
        kernel=chosen.kernel if chosen else "tvm",
        config=dict(chosen.config) if chosen else {},
        source=source,
        reason=reason,
        expected_us=chosen.expected_us if chosen else None,
        dense_us=best_dense.expected_us if best_dense else None,
        candidates=tuple(sorted(candidates, key=lambda c: c.expected_us)),
        refusals={
            name: why
            for name, why in refusals.items()
            if all(candidate.format != name for candidate in candidates)
        },
    )


def _measured(
    site: WeightSite, machine: Machine, book: RecordBook | None, digest: str
) -> list[Candidate]:
    """Return the fastest measured configuration of every kernel, for exactly this layer."""
    best: dict[str, Candidate] = {}
    for record in book.measured(site.workload, digest) if book else ():
        if record.kernel not in _KERNELS:
            continue
        candidate = Candidate(
            template_named(record.kernel).format,
            record.kernel,
            dict(record.config),
            max(round(record.us or 0.0, 2), 0.01),
            measured=True,
        )
        known = best.get(record.kernel)
        if (known is None or candidate.expected_us < known.expected_us) and _is_buildable(
            site, machine, candidate
        ):
            best[record.kernel] = candidate
    return list(best.values())


def _is_buildable(site: WeightSite, machine: Machine, candidate: Candidate) -> bool:
    template = template_named(candidate.kernel)
    if not template.takes(site.workload, machine):
        return False
    try:
        check_config(site.name, template, site.workload, machine, candidate.config)
    except PlanError:
        return False
    # The format's other conditions are on the configuration, too.
    geometry = site.workload.geometry
    assert geometry is not None
    any_weight = np.zeros((1, geometry.weight_shape[1]), numpy_dtype(site.workload.dtype))
    return bool(FORMATS[template.format].supports(any_weight, candidate.config))


def _margin(hint: Hint) -> float:
    """Tell how much slower than the model's choice, by estimate, a hint may be."""
    if not hint.trusted:
        return HINT_MARGIN
    return math.inf if hint.distance <= NEARLY_THE_SAME else TRUSTED_MARGIN


def _hinted(
    site: WeightSite,
    profile: SparsityProfile,
    machine: Machine,
    book: RecordBook,
    chosen: Candidate | None,
) -> tuple[Candidate, str] | None:
    """Take over what a similar layer got; times of other machines have to agree with the model."""
    for hint in book.similar(site.workload, Statistics.of(profile)):
        if hint.record.kernel not in _KERNELS:
            continue
        template = template_named(hint.record.kernel)
        if not template.takes(site.workload, machine):
            continue
        config = dict(hint.record.config)
        candidate = Candidate(template.format, template.name, config, 0.0)
        if not _is_buildable(site, machine, candidate):
            continue
        us = round(template.estimate(site.workload, machine, profile, config), 2)
        limit = math.inf if chosen is None else _margin(hint) * chosen.expected_us
        if us > limit or not math.isfinite(us):
            continue
        return replace(candidate, expected_us=us), f"as was fastest for {hint.describe()}"
    return None


def fits(pattern: str, names: Sequence[str]) -> bool:
    """Tell whether a layer name or pattern (`fnmatch`) names one of the layers."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse patterns that name no layer.

    Raises
    ------
    PlanError
        For the first one.
    """
    for pattern in patterns:
        if not fits(pattern, names):
            raise PlanError(f"no layer is called '{pattern}', and none matches it as a pattern")


def _forced(name: str, force: Mapping[str, str] | None) -> str | None:
    for pattern, wanted in (force or {}).items():
        if fits(pattern, [name]):
            return wanted
    return None


def _fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    return min(candidates, key=lambda c: c.expected_us, default=None)


def _candidates(
    workload: Workload, profile: SparsityProfile, machine: Machine
) -> tuple[list[Candidate], dict[str, str]]:
    """Estimate every template at its best configuration; list the refusals of the others."""
    found: list[Candidate] = []
    refusals: dict[str, str] = {}
    # That a kernel is for another type says less than why one for this type refuses.
    other_types: dict[str, str] = {}
    for template in templates_for(machine):
        match = template.takes(workload, machine)
        if not match:
            reasons = refusals if workload.dtype in template.dtypes else other_types
            reasons[template.format] = match.reason
            continue
        timed = [
            Candidate(
                template.format,
                template.name,
                config,
                round(template.estimate(workload, machine, profile, config), 2),
            )
            for config in template.space(workload, machine)
        ]
        best = _fastest(timed)
        if best is not None:
            found.append(best)
    stock = stock_dense(workload, machine)
    if stock is not None:
        found.append(Candidate("dense", "tvm", {}, round(stock, 2)))
    return found, {**refusals, **{k: v for k, v in other_types.items() if k not in refusals}}


def _choose(
    name: str,
    profile: SparsityProfile,
    estimated: Sequence[Candidate],
    refusals: Mapping[str, str],
    force: Mapping[str, str] | None,
    forbid: Sequence[str],
    measured: Sequence[Candidate],
) -> tuple[Candidate | None, str, str] | None:
    """Choose among the measured candidates, or else among the estimated ones.

    None when what the user wants was not measured.
    """
    candidates = measured or estimated
    dense = _fastest([c for c in candidates if c.format in DENSE_FORMATS])
    sparse = _fastest([c for c in candidates if c.format not in DENSE_FORMATS])
    wanted = _forced(name, force)
    if wanted is not None:
        option = (
            dense if wanted == "dense" else _fastest([c for c in candidates if c.format == wanted])
        )
        if option is None and measured:
            return None
        if option is None and wanted != "dense":
            reason = refusals.get(wanted, f"there is no format '{wanted}'")
            raise PlanError(f"layer '{name}' cannot be {wanted}: {reason}")
        return option, "user", f"forced to {wanted}"
    if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in forbid):
        return None if dense is None and measured else (dense, "user", "kept dense by the user")
    source, verb = ("record", "measured") if measured else ("model", "expected")
    if sparse is None:
        if any(c.format not in DENSE_FORMATS for c in estimated):
            return dense, source, "no sparse kernel was measured"
        sparse_refusals = [why for key, why in refusals.items() if key not in DENSE_FORMATS]
        return dense, source, next(iter(sparse_refusals), "no sparse kernel takes it")
    if dense is None:
        return sparse, source, "no dense kernel takes it"
    if profile.nnz == profile.size and not measured:
        return dense, source, "the weight has no zeros"
    ratio = dense.expected_us / sparse.expected_us
    times = f"{sparse.expected_us:.0f} us sparse, {dense.expected_us:.0f} us dense"
    if sparse.expected_us < (1.0 if measured else SPARSE_MARGIN) * dense.expected_us:
        return sparse, source, f"{verb} {ratio:.1f}x faster ({times})"
    share = f"{100 * (1 - profile.density):.0f} % zeros"
    return dense, source, f"{share} do not pay here ({verb} {times})"
