"""Compile the layers of `cuda_cases.py` to libraries, on a machine that needs no GPU."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from cuda_cases import OVERHEAD, Case
from onnx import helper, numpy_helper
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.schedules.lookup import template_named, templates_for

import tvm_sparse as ts
from tvm_sparse.compiler import profile_site, with_threads
from tvm_sparse.errors import SparseError
from tvm_sparse.files import write_text
from tvm_sparse.formats import FORMATS
from tvm_sparse.targets import CudaMachine, machine_of, resolve_target
from tvm_sparse.tuner import rank
from tvm_sparse.workload import Conv2dGeometry

VERSION = 1
LAYER = "layer"


class SkippedError(Exception):
    """A case that no kernel takes, and why."""


def build(
    folder: Path, cases: Sequence[Case], target: str, configs: int = 0, weights: bool = True
) -> dict[str, Any]:
    """Compile cases into a folder, and describe them in its ``cases.json``.

    Cases of other names that the folder already holds stay, if they are for the same target.

    Parameters
    ----------
    configs : int
        Beside the plan's choice, so many configurations of lowest estimate; the run takes the
        fastest.
    weights : bool
        Whether weights are written, too; without, the run draws them again.

    Returns
    -------
    dict
        What ``cases.json`` holds.
    """
    machine = machine_of(resolve_target(target))
    if not isinstance(machine, CudaMachine):
        raise SparseError(f"'{target}' is no GPU; this benchmark builds for targets such as sm_90a")
    folder.mkdir(parents=True, exist_ok=True)
    found = _begin(folder / "cases.json", target, machine)
    for case in (*cases, OVERHEAD):
        started = time.perf_counter()
        found["cases"] = [old for old in found["cases"] if old["name"] != case.name]
        try:
            built = _build_case(folder, case, machine, target, configs, weights)
        except (SkippedError, SparseError) as error:
            found["skipped"][case.name] = str(error)
            print(f"{case.name}: skipped: {error}", flush=True)
        else:
            found["skipped"].pop(case.name, None)
            found["cases"].append(built)
            print(f"{case.name}: {_said(built, time.perf_counter() - started)}", flush=True)
        write_text(folder / "cases.json", json.dumps(found, indent=1) + "\n")
    return found


def _begin(path: Path, target: str, machine: CudaMachine) -> dict[str, Any]:
    now = {
        "version": VERSION,
        "target": target,
        "machine": asdict(machine),
        "tvm": tvm.__version__,
        "tvm_sparse": ts.__version__,
    }
    try:
        before = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        before = {}
    if all(before.get(key) == value for key, value in now.items()):
        return dict(before)
    return {**now, "cases": [], "skipped": {}}


def _said(built: dict[str, Any], seconds: float) -> str:
    first = built["libraries"][0]
    more = len(built["libraries"]) - 1
    others = f" and {more} more" if more else ""
    return (
        f"{first['kernel']} {first['config']}{others}, {first['expected_us']:.1f} us expected, "
        f"built in {seconds:.1f} s"
    )


def _build_case(
    folder: Path, case: Case, machine: CudaMachine, target: str, configs: int, weights: bool
) -> dict[str, Any]:
    _check_taken(case, machine)
    weight = case.weight()
    model = ts.load(model_of(case, weight))
    slug = re.sub(r"[^A-Za-z0-9.@-]+", "_", case.name)
    libraries: list[dict[str, Any]] = []
    for number, plan in enumerate(_plans(model, case, machine, target, configs)):
        file = f"{slug}.{number}.so"
        try:
            module = ts.compile(model, target, plan, check=False)
            module.export(folder / file)
        except SparseError as error:
            print(f"{case.name}: {plan.decisions[0].config} cannot be built: {error}", flush=True)
            continue
        decision = plan.decisions[0]
        libraries.append(
            {
                "file": file,
                "kernel": decision.kernel,
                "config": dict(decision.config),
                "expected_us": decision.expected_us,
                "packed_bytes": module.report.layers[0].bytes_packed,
            }
        )
    if not libraries:
        raise SkippedError("no configuration could be built")
    if weights:
        np.savez(folder / f"{slug}.npz", weight=weight)
    return {
        **case.to_data(),
        "density": np.count_nonzero(weight) / weight.size,
        "nnz": int(np.count_nonzero(weight)),
        "digest": digest(weight),
        "weights": f"{slug}.npz" if weights else None,
        "libraries": libraries,
    }


def digest(weight: np.ndarray) -> str:
    """Digest a weight, so that the run knows the one that the kernel was built with."""
    return hashlib.sha256(np.ascontiguousarray(weight).view(np.uint8).data).hexdigest()[:24]


def _check_taken(case: Case, machine: CudaMachine) -> None:
    """Skip before anything large is drawn what no template takes."""
    reading = [t for t in templates_for(machine) if t.format == case.format]
    if case.format not in FORMATS or not reading:
        raise SkippedError(f"no kernel for {machine.arch} reads the format '{case.format}' yet")
    refusals = [template.takes(case.workload, machine) for template in reading]
    if not any(refusals):
        raise SkippedError(refusals[0].reason)


def _plans(
    model: Any, case: Case, machine: CudaMachine, target: str, configs: int
) -> Iterator[ts.Plan]:
    """Yield the plan, and the same with the configurations of lowest estimate."""
    plan = ts.plan(model, target, force={LAYER: case.format})
    yield plan
    decision = plan.decisions[0]
    for us, kernel, config in _ranked(model, case, machine)[:configs]:
        if (kernel, config) == (decision.kernel, dict(decision.config)):
            continue
        other = replace(decision, kernel=kernel, config=config, expected_us=round(us, 2))
        yield replace(plan, decisions=(other,))


def _ranked(
    model: Any, case: Case, machine: CudaMachine
) -> list[tuple[float, str, dict[str, Any]]]:
    """List what the templates of a case's format may be given, the lowest estimate first."""
    site = with_threads(collect_weights(model)[0].site, machine)
    return [
        (entry.estimate, entry.candidate.kernel, dict(entry.candidate.config))
        for entry in rank(site, profile_site(model, site), machine)
        if template_named(entry.candidate.kernel).format == case.format
    ]


def model_of(case: Case, weight: np.ndarray) -> onnx.ModelProto:
    """Make a model of one layer without bias and activation."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    x_shape, y_shape = case.shapes
    g = case.geometry
    if isinstance(g, Conv2dGeometry):
        stored = weight.reshape(g.out_channels, g.in_channels // g.groups, *g.kernel)
        options = {
            "strides": g.strides,
            "pads": g.padding,
            "dilations": g.dilation,
            "group": g.groups,
        }
        node = helper.make_node("Conv", ["x", "w"], ["y"], LAYER, **options)
    else:
        stored = np.ascontiguousarray(weight.T)
        node = helper.make_node("MatMul", ["x", "w"], ["y"], LAYER)
    graph = helper.make_graph(
        [node],
        LAYER,
        [helper.make_tensor_value_info("x", element, x_shape)],
        [helper.make_tensor_value_info("y", element, y_shape)],
        [numpy_helper.from_array(stored, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)
