"""The functions that users call: inspect, plan, compile, build, and the pipeline that TVM calls."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from . import __version__
from .calibration import planned_machine
from .cpu_features import machine_identity, missing_features, required_features
from .cuda_toolkit import gpu_here, machine_code, runs_on
from .deploy import export, wrap_executable
from .errors import ModelError, PlanError
from .frontends.tensor_files import is_checkpoint
from .inspection import inspect_checkpoint
from .manifest import Manifest
from .model import Model
from .ops import WeightSite
from .passes.collect_weights import FusedSite, collect_weights
from .passes.find_fresh_outputs import find_fresh_outputs
from .passes.rewrite_weights import KernelCall
from .passes.take_out_constants import take_out_constants
from .pipeline import Lowered, late_passes, lower_model
from .planner import Decision, Plan, check_patterns, decide
from .plugin import sparse_pipeline
from .profile import SparsityProfile, profile_weight
from .progress import Progress
from .records import RecordFile, read_records, weight_digest
from .report import LayerReport, Report
from .runtime import CompiledModule
from .schedules.base import matrix_view
from .targets import CudaMachine, Machine, TargetLike, machine_of, resolve_target, target_data
from .tuning.book import RecordBook, history_of
from .verify import verify
from .workload import Conv2dGeometry

Records = str | os.PathLike[str] | RecordFile | None


def inspect(source: Any, *, shapes: Mapping[str, Sequence[int]] | None = None) -> Report:
    """Profile the weight of every matmul and convolution of a model.

    Parameters
    ----------
    source : path, onnx.ModelProto, torch.export.ExportedProgram, tvm.IRModule or Model
        Or a safetensors file, its index or its folder: then the weights by name, without a graph.
    shapes : mapping, optional
        Fixes symbolic dimensions, by input name.

    Returns
    -------
    Report
        `str` gives a table, `.layers` and `.to_json()` the data.
    """
    if is_checkpoint(source):
        if shapes:
            raise ModelError("a checkpoint has no graph, and so no inputs whose shapes to fix")
        return inspect_checkpoint(source)
    model = load_model(source, shapes)
    layers = []
    for fused_site in collect_weights(model):
        site = fused_site.site
        layers.append(
            replace(_layer(model, site, profile_site(model, site)), reason=site.refusal or None)
        )
    return Report(model.source, layers=tuple(layers), notes=tuple(model.notes))


def plan(
    source: Any,
    target: TargetLike = "native",
    records: Records = None,
    *,
    threads: int | None = None,
    force: Mapping[str, str] | None = None,
    forbid: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Decide for every weight which kernel it gets.

    Parameters
    ----------
    source
        As for `inspect`.
    target : str, mapping or tvm.target.Target
        "native", a short name, or a TVM target.
    records : path or RecordFile, optional
        Tuning records: a layer that was measured on this machine gets its fastest kernel, another
        one what the most similar layer got.
    threads : int, optional
        Threads to plan for; by default TVM_NUM_THREADS, else all cores.
    force : mapping of str to str
        Layer name or pattern to format ("dense", "register_tiled").
    forbid : sequence of str
        Layer names or patterns that stay dense.

    Raises
    ------
    PlanError
        When a forced format cannot hold a layer, or a pattern in `force` or `forbid` fits no layer.
    """
    model = load_model(source, shapes)
    resolved = resolve_target(target)
    book = record_book(records, resolved)
    machine = planned_machine(resolved, threads)
    sites = [with_threads(fused.site, machine) for fused in collect_weights(model)]
    check_patterns([*(force or {}), *forbid], [site.name for site in sites])
    decisions = [
        decide(
            site,
            profile_site(model, site),
            machine,
            force=force,
            forbid=forbid,
            book=book,
            digest=weight_digest(model.params[site.param]) if book else "",
        )
        for site in sites
    ]
    return Plan(target_data(resolved), machine.threads, model.digest(), tuple(decisions))


def compile(
    source: Any,
    target: TargetLike = "native",
    plan: Plan | str | None = None,
    records: Records = None,
    check: bool = True,
    *,
    threads: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> CompiledModule:
    """Compile a model; its pruned layers get sparse kernels.

    Parameters
    ----------
    source
        As for `inspect`.
    target, records, threads
        As for `plan`.
    plan : Plan or path, optional
        Made before, perhaps edited; by default a new one.
    check : bool
        Compare every rewritten layer and the whole model with the dense one on random inputs before
        handing the module over. Impossible, and left out with a note, when the target is not this
        machine.
    shapes : mapping, optional
        Fixes symbolic dimensions, by input name.
    progress : Progress, optional
        Shows what is being done.

    Raises
    ------
    CheckError
        When the compiled module disagrees with the dense model.
    ModelError
        When the model cannot be read, or holds what TVM cannot generate code for.
    PlanError
        When the plan was made for another model or target.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    with progress.phase("load"):
        model = load_model(source, shapes)
    resolved = resolve_target(target)
    records = open_records(records)
    book = record_book(records, resolved)
    given = _read_plan(plan)
    if given is not None:
        _check_plan(given, model, resolved)
    the_plan = given or _plan_for(model, resolved, threads, records, progress)
    machine = machine_of(resolved, the_plan.threads if threads is None else threads)
    sites = [
        replace(fused, site=with_threads(fused.site, machine)) for fused in collect_weights(model)
    ]
    lowered, executable, weights = _build(model, sites, the_plan, machine, resolved, progress)
    report = _report(model, sites, the_plan, lowered, machine, book)
    manifest = _manifest(model, the_plan, report, lowered, resolved, machine)
    module = wrap_executable(executable, manifest, machine.threads, weights)
    if check and module.refusal is None:
        report = _checked(model, sites, lowered, module, report, progress)
    else:
        why = module.refusal or "the caller asked for no check"
        report = replace(
            report, notes=(*report.notes, f"not checked against the dense model: {why}")
        )
    totals = {**report.totals, "compile_seconds": round(time.perf_counter() - started, 2)}
    report = replace(report, totals=totals)
    manifest = replace(manifest, report=json.loads(report.to_json()))
    return module.described_by(manifest, partial(export, executable, manifest, weights=weights))


def build(
    mod: Any,
    target: TargetLike = "llvm",
    params: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Build a Relax module, in the shape of `relay.build` and `relax.build`.

    Parameters
    ----------
    mod : tvm.IRModule
        Weights as constants, or as parameters with their values in `params`.
    target : str, mapping or tvm.target.Target
        "llvm" means this machine.
    params : mapping of str to array, optional
        Values of parameters of `main`.
    **options
        `threads`, `force`, `forbid`, `records` as for `plan`.

    Returns
    -------
    tvm.relax.VMExecutable
        For `relax.VirtualMachine` or `export_library`.
    """
    resolved = resolve_target(target)
    if params:
        values = {name: _array(value) for name, value in params.items()}
        mod = relax.transform.BindParams("main", values)(mod)
    with machine_code_for(machine_of(resolved)):
        return tvm.compile(mod, resolved, relax_pipeline=sparse_pipeline(**options))


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()


def load_model(source: Any, shapes: Mapping[str, Sequence[int]] | None) -> Model:
    """Load a model, unless it is one already."""
    from .frontends.loading import load

    return source if isinstance(source, Model) and not shapes else load(source, shapes=shapes)


def open_records(records: Records) -> RecordFile | None:
    """Read tuning records; lines that are none are warned of.

    Raises
    ------
    RecordError
        When the file cannot be read.
    """
    if records is None or isinstance(records, RecordFile):
        return records
    file = read_records(records)
    for sentence in file.skipped:
        warnings.warn(sentence, stacklevel=3)
    return file


def record_book(records: Records, target: Any) -> RecordBook | None:
    """Look tuning records up for a target.

    Raises
    ------
    RecordError
        When the file cannot be read.
    """
    file = open_records(records)
    if file is None:
        return None
    return RecordBook(file, target_data(target), _identity_here(target), tvm.__version__)


def _identity_here(target: Any) -> str | None:
    """Name this machine as records do, if it runs the target's code."""
    if target.kind.name == "cuda":
        found = gpu_here()
        arch = str(target.attrs.get("arch", ""))
        return gpu_identity(*found) if found and runs_on(arch, found[1]) else None
    foreign = target.kind.name != "llvm" or missing_features(required_features(target))
    return None if foreign else machine_identity()


def gpu_identity(name: str, capability: int) -> str:
    """Name a GPU as records do, for example ``NVIDIA H100 80GB HBM3, sm_90``."""
    return f"{name}, sm_{capability}"


def with_threads(site: WeightSite, machine: Machine) -> WeightSite:
    """Plan a site for the threads of a machine."""
    return replace(site, workload=replace(site.workload, threads=machine.threads))


def profile_site(model: Model, site: WeightSite) -> SparsityProfile:
    """Profile the weight of a site."""
    geometry = site.workload.geometry
    taps = 1
    if isinstance(geometry, Conv2dGeometry):
        taps = geometry.kernel[0] * geometry.kernel[1]
    weight = model.params[site.param]
    if weight.ndim < 2:
        weight = weight.reshape(1, -1)
    return profile_weight(
        matrix_view(weight, site.workload.op if weight.ndim == 2 else "conv2d"), taps=taps
    )


def _layer(model: Model, site: WeightSite, profile: SparsityProfile) -> LayerReport:
    return LayerReport(
        name=site.name,
        op=site.workload.op,
        shape=site.weight_shape,
        dtype=site.workload.dtype,
        density=profile.density,
        pattern=profile.pattern,
        nnz=profile.nnz,
        findings=profile.findings,
        bytes_dense=int(model.params[site.param].nbytes),
    )


def _read_plan(source: Plan | str | None) -> Plan | None:
    return source if source is None or isinstance(source, Plan) else Plan.from_json(source)


def _plan_for(
    model: Model, target: Any, threads: int | None, records: Records, progress: Progress
) -> Plan:
    with progress.phase("plan"):
        return plan(model, target, records, threads=threads)


def _check_plan(the_plan: Plan, model: Model, target: Any) -> None:
    if the_plan.digest != model.digest():
        raise PlanError("the plan was made for another model: its weights differ from these")
    if dict(the_plan.target) != target_data(target):
        raise PlanError(
            f"the plan was made for the target {dict(the_plan.target)}, "
            f"not for {target_data(target)}"
        )


@contextmanager
def machine_code_for(machine: Machine) -> Iterator[None]:
    """Have TVM generate machine code for a GPU, and not only its source."""
    if not isinstance(machine, CudaMachine):
        yield
        return
    with machine_code(machine.arch):
        yield


def _build(
    model: Model,
    sites: Sequence[FusedSite],
    the_plan: Plan,
    machine: Machine,
    target: Any,
    progress: Progress,
) -> tuple[Lowered, Any, list[Any]]:
    """Return what was compiled, the executable, and the weights that it asks for."""
    lowered = lower_model(model, sites, the_plan, machine, progress)
    weights: list[Any] = []
    with progress.phase("generate code"):
        try:
            passes = late_passes(machine, target)
            # A GPU's weights are copied to it in any case.
            if not isinstance(machine, CudaMachine):
                passes = tvm.transform.Sequential([passes, take_out_constants(weights)])
            with machine_code_for(machine):
                executable = tvm.compile(lowered.mod, target, relax_pipeline=passes)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            # dlight's schedules assert without words what they expect.
            lines = str(error).strip().splitlines() or [f"{type(error).__name__} in its schedules"]
            raise ModelError(f"TVM cannot compile this model: {lines[0]}") from error
    return lowered, executable, weights


def _report(
    model: Model,
    sites: Sequence[FusedSite],
    the_plan: Plan,
    lowered: Lowered,
    machine: Machine,
    book: RecordBook | None,
) -> Report:
    layers = []
    for fused_site in sites:
        site = fused_site.site
        decision = the_plan.decision(site.name)
        layer = _layer(model, site, profile_site(model, site))
        layers.append(
            replace(
                layer,
                format=decision.format if decision.is_sparse else "dense",
                kernel=decision.kernel,
                config=_reported_config(site, decision, lowered.calls.get(site.binding)),
                source=decision.source,
                reason=decision.reason,
                expected_us=decision.expected_us,
                dense_us=decision.dense_us,
                bytes_packed=lowered.packed_bytes.get(site.name, layer.bytes_dense),
                history=_history(model, site, book),
            )
        )
    return Report(
        model.source,
        target=machine.name,
        threads=machine.threads,
        layers=tuple(layers),
        notes=tuple(model.notes),
    )


def _history(
    model: Model, site: WeightSite, book: RecordBook | None
) -> tuple[tuple[int, float], ...]:
    if book is None:
        return ()
    return history_of(book.measured(site.workload, weight_digest(model.params[site.param])))


def _reported_config(
    site: WeightSite, decision: Decision, call: KernelCall | None
) -> dict[str, Any]:
    fused = site.workload.epilogue.describe()
    config = {**shown_config(decision.config), **({"fused": fused} if fused else {})}
    if call is not None and call.panels is not None:
        config["layout"] = "panels"
    return config


def shown_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration what nobody reads: a schedule's steps are in the plan."""
    return {key: value for key, value in config.items() if key != "trace"}


def _checked(
    model: Model,
    sites: Sequence[FusedSite],
    lowered: Lowered,
    module: CompiledModule,
    report: Report,
    progress: Progress,
) -> Report:
    """Check the module, and write each layer's error into the report."""
    checks = verify(model, sites, lowered, module, progress)
    layers = []
    for layer in report.layers:
        found = checks.get(layer.name)
        if found is not None:
            layer = replace(layer, error=found.max_error, error_share=found.max_ratio)
        layers.append(layer)
    return replace(report, layers=tuple(layers))


def _manifest(
    model: Model,
    the_plan: Plan,
    report: Report,
    lowered: Lowered,
    target: Any,
    machine: Machine,
) -> Manifest:
    return Manifest(
        package_version=__version__,
        tvm_version=tvm.__version__,
        target=target_data(target),
        cpu_features=required_features(target),
        threads=machine.threads,
        inputs=model.inputs,
        outputs=model.outputs,
        plan=json.loads(the_plan.to_json()),
        report=json.loads(report.to_json()),
        digest=the_plan.digest,
        kernels=lowered.kernels,
        fresh_outputs=find_fresh_outputs(lowered.mod),
    )
