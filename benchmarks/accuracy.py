"""What each form of sparsity costs in accuracy, and what it gives in speed, on real images.

    python benchmarks/accuracy.py train   # half an hour: ONNX files and their accuracies, in build/
    python benchmarks/accuracy.py time    # some minutes on an idle machine
    python benchmarks/accuracy.py page    # the tables of docs/forms.md, and docs/images/digits.svg

The recipe is that of `tutorials/05_prune_finetune_deploy.py`. `time` compiles every file, sees that
its answers are still right, and times it on one thread, pinned, interleaved with ONNX Runtime and
OpenVINO in float32 on the same network without zeros. Cases that are there already are left out by
`train` and measured again by `time`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from peers import best_float32, peers_of
from results import Store, replaced

import tvm_sparse as ts
from tvm_sparse.bench import OURS, cpu_name, interleave, pinned, versions
from tvm_sparse.files import write_text
from tvm_sparse.targets import resolve_target

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "tutorials" / "05_prune_finetune_deploy.py"
RESULTS = ROOT / "benchmarks" / "results"
TRAINED = "digits.json"


@lru_cache
def tutorial() -> ModuleType:
    """Load the tutorial: its name is none that an import could say."""
    spec = importlib.util.spec_from_file_location("tutorial", TUTORIAL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where its dataclasses look for the names of their fields' types.
    sys.modules["tutorial"] = module
    spec.loader.exec_module(module)
    return module


def wanted(network: str, text: str) -> list[Any]:
    """List the forms of a network whose names hold a text."""
    steps = tutorial()
    forms = steps.forms_of(network, steps.FORMS)
    return [form for form in forms if text in f"{network}: {form.name}"]


def train(folder: Path, text: str) -> None:
    """Train, prune and deploy what the folder lacks."""
    steps = tutorial()
    recipe, data = steps.FULL, steps.load_images(steps.FULL.variants)
    known = folder / TRAINED
    found = json.loads(known.read_text()) if known.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    for network in steps.NETWORKS:
        names = [case["name"] for case in found]
        missing = [f for f in wanted(network, text) if f"{network}: {f.name}" not in names]
        # A dense network that is trained again is the same one: the seeds are fixed.
        for outcome in steps.outcomes(network, missing, recipe, data, folder) if missing else ():
            name = f"{network}: {outcome.form}"
            found = replaced(found, {"name": name, **asdict(outcome)})
            write_text(known, json.dumps(found, indent=1) + "\n")
            print(steps.row(outcome), flush=True)


def measure(folder: Path, path: Path, text: str, seconds: float) -> None:
    """Compile and time every file, and write each into the results as soon as it is there."""
    steps = tutorial()
    data = steps.load_images(steps.FULL.variants)
    for network in steps.NETWORKS:
        for form in wanted(network, text):
            case, cores = time_form(network, form, folder, data, seconds)
            about = {
                "cpu": cpu_name(),
                "threads": 1,
                "cores": cores,
                "batch": steps.BATCH,
                "held out": len(data.held_out.y),
                "distorted": len(data.distorted.y),
                "versions": versions(["onnxruntime", "openvino"]),
            }
            Store(path).add(network, about, case)
            print(f"{steps.row(tutorial_outcome(case))} {speed(case):5.2f}x", flush=True)


def time_form(
    network: str, form: Any, folder: Path, data: Any, seconds: float
) -> tuple[dict[str, Any], list[int]]:
    """Compile one file, count its right answers, and time it beside the dense libraries."""
    steps = tutorial()
    file = steps.onnx_file(folder, network, form)
    outcome = steps.deploy(network, form, file, data)
    module = ts.load_module(file.with_suffix(".so"), threads=1)
    x = np.ascontiguousarray(data.held_out.x[: steps.BATCH])
    dense = steps.onnx_file(folder, network, steps.DENSE).read_bytes()
    with pinned(1) as cores:
        peers = peers_of(dense, x, 1, only_float32=True)
        calls = {OURS: partial(module, x), **{name: peer.call for name, peer in peers.items()}}
        rounds = interleave(calls, seconds=seconds)
    ms = {name: round(1e3 * float(np.median(times)), 4) for name, times in rounds.items()}
    return {"name": form.name, "ms": ms, **asdict(outcome)}, list(cores)
