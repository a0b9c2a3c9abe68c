"""What each form of sparsity costs in accuracy, and what it gives in speed, on real images.

    python benchmarks/accuracy.py train   # twenty minutes: ONNX files and accuracies, in build/
    python benchmarks/accuracy.py time    # some minutes on an idle machine
    python benchmarks/accuracy.py page    # the tables of docs/forms.md, and docs/images/digits.svg

The recipe is that of `tutorials/05_prune_finetune_deploy.py`. `time` compiles every file, sees that
its answers are still right, and times it on one thread, pinned, interleaved with ONNX Runtime and
OpenVINO in float32 on the same network without zeros. Cases that are there already are left out by
`train` and measured again by `time`. Training repeats itself to the bit with the same versions and
number of threads only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from networks import rewrite_page
from peers import best_float32, peers_of
from results import Store, replaced

import tvm_sparse as ts
from tvm_sparse.bench import OURS, cpu_name, interleave, pinned, versions
from tvm_sparse.errors import SparseError
from tvm_sparse.files import write_text
from tvm_sparse.targets import resolve_target

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "tutorials" / "05_prune_finetune_deploy.py"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "forms.md"
IMAGE = ROOT / "docs" / "images" / "digits.svg"
MARKS = ("<!-- digits:begin -->", "<!-- digits:end -->")
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
            print(f"{network}: {form.name}: {speed(case):.2f}x", flush=True)


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


def speed(case: Mapping[str, Any]) -> float:
    """Return how many times faster than the best dense library a case is."""
    dense = best_float32(case["ms"])
    if dense is None:
        raise SparseError("a speed is one over a dense library; install onnxruntime or openvino")
    return dense / case["ms"][OURS]


def tables(sections: Mapping[str, Any]) -> Iterator[str]:
    """Write the table of each network under a line that says what was measured."""
    for network, section in sections.items():
        about, cases = section["environment"], section["cases"]
        names = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        yield (
            f"**{network}**, {about['batch']} images a call, one thread, {about['cpu']}, "
            f"{about['date'][:10]}; {names}. {about['held out']} images are held out, "
            f"{about['distorted']} are distorted ones of them; on "
            f"{sum(case['images'] - len(case['different']) for case in cases)} of "
            f"{sum(case['images'] for case in cases)} the answers are ONNX Runtime's."
        )
        yield "\n".join(table(cases))


def table(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Write form, speed, bytes and accuracy, and what the last ones are over the dense network."""
    dense = next((case for case in cases if not case["zeros"]), None)
    heads = ("ms", "over dense", "weights", "of dense", "held out", "change", "distorted", "change")
    yield f"| form, zeros | {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * len(heads)}"
    for case in cases:
        cells = [f"{case['ms'][OURS]:.2f}", f"{speed(case):.1f}x"]
        cells += [f"{case['bytes_packed'] / 1024:.0f} KiB"]
        cells += [f"{case['bytes_packed'] / dense['bytes_packed']:.2f}" if dense else "-"]
        for kind in ("accuracy", "distorted"):
            cells += [f"{case[kind]:.1%}"]
            cells += [f"{100 * (case[kind] - dense[kind]):+.1f}" if dense else "-"]
        yield f"| {case['form']} | {' | '.join(cells)} |"


def write_page(path: Path) -> None:
    """Write the tables and the plot."""
    sections = Store(path).read()
    if not sections:
        raise SparseError(f"'{path}' holds no results; `accuracy.py time` writes them")
    rewrite_page(PAGE, "\n\n".join(tables(sections)), MARKS)
    # matplotlib is only needed here.
    from plot_accuracy import draw

    draw({name: section["cases"] for name, section in sections.items()}, speed, IMAGE)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("train", "time", "page"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "digits")
    parser.add_argument("--case", default="", help="only 'network: form' that hold this text")
    parser.add_argument("--seconds", type=float, default=5.0, help="rounds of one case")
    parser.add_argument("--results", type=Path, help="the file of times")
    options = parser.parse_args()
    kind = resolve_target("native").attrs["mcpu"]
    path = options.results or RESULTS / f"digits-{kind}.json"
    try:
        if options.stage == "train":
            train(options.folder, options.case)
        elif options.stage == "time":
            measure(options.folder, path, options.case, options.seconds)
        else:
            write_page(path)
    except SparseError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
