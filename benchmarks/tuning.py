"""Measure what tuning gives, what it takes, and how soon it finds what a full walk finds.

    python benchmarks/tuning.py models    # tune whole networks, time them as planned and as tuned
    python benchmarks/tuning.py walk      # measure every candidate of some layers
    python benchmarks/tuning.py show      # the tables of results/tuning.json
    python benchmarks/tuning.py page      # the same, written to docs/tuning.md

Networks are pruned to 90 % by magnitude, layer by layer, all but the first convolution and
depthwise ones. A module planned without records and one with them are timed in turn, in one
process. A walk measures every configuration of every template of a layer, but for those expected to
take three times as long as the best; searches are then replayed on its times, once for every seed,
which needs no further measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Before TVM starts its threads.
os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
from networks import pruned, rewrite_page
from timing import System, hot

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.bench import cpu_name, versions
from tvm_sparse.calibration import calibrated
from tvm_sparse.files import write_text
from tvm_sparse.ops import WeightSite
from tvm_sparse.planner import decide
from tvm_sparse.profile import profile_weight
from tvm_sparse.progress import Progress
from tvm_sparse.records import read_records
from tvm_sparse.targets import machine_of, resolve_target, target_data
from tvm_sparse.tuner import rank
from tvm_sparse.tuning.book import describe_geometry
from tvm_sparse.tuning.job import Job, rotation
from tvm_sparse.tuning.measurer import Candidate, Measurer, Outcome, job_folder
from tvm_sparse.tuning.search import Ranked, Search
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tuning.md"
BEGIN, END = "<!-- tuning:begin -->", "<!-- tuning:end -->"
RESULTS = ROOT / "benchmarks" / "results" / "tuning.json"
VERSION = 1
SPARSITY = 0.9

NETWORKS = {
    "BERT-base encoder, 128 tokens": zoo.bert_encoder,
    "ResNet-50": partial(zoo.light_model, "resnet50"),
    "MobileNetV1": zoo.mobilenet_v1,
}

# Layers whose candidates are all measured: shape, and the spread of shapes that models have.
WALKS: tuple[MatmulGeometry | Conv2dGeometry, ...] = (
    MatmulGeometry(768, 768, 128),
    MatmulGeometry(768, 768, 16),
    Conv2dGeometry(1, 128, 28, 28, 128, (3, 3), padding=(1, 1, 1, 1)),
    Conv2dGeometry(1, 512, 14, 14, 512, (1, 1)),
)
HOPELESS = 3.0
# What searches are replayed with: the estimates as they are, and as a model gives them that is off
# by a quarter.
NOISES = {"estimates as they are": 0.0, "off by a quarter": 0.25}
SEEDS = 10
# A trial counts as a hit from this share of the best speed on.
CLOSE = 0.95
TRIALS = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("models", "walk", "show", "page"))
    parser.add_argument("--only", default="", help="networks or shapes whose name holds this")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what in MEASURES:
        MEASURES[options.what](options)
    tables = show(read(options.json))
    if options.what == "page":
        rewrite_page(PAGE, tables, (BEGIN, END))
    print(tables)
    return 0


def read(path: Path) -> dict[str, Any]:
    """Return the results; empty ones when there are none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        data = {}
    known = data if data.get("version") == VERSION else {}
    return {"version": VERSION, "models": {}, "walks": {}, **known}


def keep(path: Path, kind: str, name: str, found: Mapping[str, Any]) -> None:
    """Put one result into the file, in place of an older one."""
    data = read(path)
    environment = {
        "cpu": cpu_name(),
        "versions": versions(["optuna"]),
        "date": time.strftime("%Y-%m-%d"),
    }
    data[kind][name] = {**environment, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------
# Whole networks
# ---------------------------------------------------------------------------------------------


def measure_models(options: argparse.Namespace) -> None:
    folder = options.json.parent / "tuning-records"
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in NETWORKS.items():
        if options.only in name:
            records = folder / f"{name.split(',')[0].replace(' ', '_')}.jsonl"
            keep(options.json, "models", name, _network(build(), records, options.trials))


def _network(proto: Any, records: Path, trials: int) -> dict[str, Any]:
    model = ts.load(pruned(proto, SPARSITY))
    records.unlink(missing_ok=True)
    started = time.perf_counter()
    found = ts.tune(model, trials=trials, records=records, threads=1, progress=Progress())
    seconds = time.perf_counter() - started
    print(found)
    modules = {
        "planned": ts.compile(model, threads=1),
        "tuned": ts.compile(model, records=records, threads=1),
    }
    spec = modules["tuned"].inputs[0]
    x = np.random.default_rng(0).standard_normal(spec.shape, np.float32)
    systems = {k: System([partial(m, x)], _nothing) for k, m in modules.items()}
    times = hot(systems, 30.0)
    return {
        "threads": 1,
        "trials a workload": trials,
        "seconds": round(seconds, 1),
        "workloads": len(found.tasks),
        "layers": sum(len(task.layers) for task in found.tasks),
        "measured": sum(task.trials for task in found.tasks),
        "failed": sum(task.failures for task in found.tasks),
        "noisy": sum(task.noisy for task in found.tasks),
        "layers planned us": round(found.untuned_us, 1),
        "layers tuned us": round(found.tuned_us, 1),
        "layers dense us": round(sum(len(t.layers) * (t.dense_us or 0) for t in found.tasks), 1),
        "model planned us": times["planned"].median,
        "model tuned us": times["tuned"].median,
        "changed": sum(t.us != t.untuned_us for t in found.tasks),
        "record bytes": records.stat().st_size,
        "statuses": _counts([r.status for r in read_records(records).records]),
    }


def _nothing() -> None:
    pass


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}


# ---------------------------------------------------------------------------------------------
# Full walks
# ---------------------------------------------------------------------------------------------


def measure_walks(options: argparse.Namespace) -> None:
    target = resolve_target("native")
    machine = calibrated(machine_of(target, 1), target)
    for geometry in WALKS:
        name = describe_geometry(geometry)
        if options.only not in name:
            continue
        op = "matmul" if isinstance(geometry, MatmulGeometry) else "conv2d"
        workload = Workload(op, geometry)
        weight = _weight(geometry)
        profile = profile_weight(weight)
        site = WeightSite("layer", "weight", "output", workload, weight.shape)
        ranked = rank(site, profile, machine)
        ranked = [r for r in ranked if r.estimate <= HOPELESS * ranked[0].estimate]
        taps = math.prod(geometry.kernel) if isinstance(geometry, Conv2dGeometry) else 1
        job = Job(workload, machine, target_data(target), rotation([weight], taps), [])
        started = time.perf_counter()
        with job_folder(job) as folder, Measurer(1) as measurer:
            outcomes = dict(measurer.measure(folder, [entry.candidate for entry in ranked]))
        decision = decide(site, profile, machine)
        rows = [
            {
                "kernel": entry.candidate.kernel,
                "config": dict(entry.candidate.config),
                "estimate": round(entry.estimate, 2),
                "us": outcomes[index].us,
                "status": outcomes[index].status,
            }
            for index, entry in enumerate(ranked)
        ]
        seconds = round(time.perf_counter() - started, 1)
        planned = {"kernel": decision.kernel, "config": dict(decision.config)}
        keep(options.json, "walks", name, {"seconds": seconds, "planned": planned, "rows": rows})
        print(f"{name}: {len(rows)} candidates in {seconds:.0f} s", flush=True)


def _weight(geometry: MatmulGeometry | Conv2dGeometry) -> np.ndarray:
    rows, columns = geometry.weight_shape
    weight = zoo.trained_like(np.random.default_rng(0), (rows, columns), 0.05)
    cut = np.quantile(np.abs(weight), SPARSITY)
    return np.where(np.abs(weight) < cut, np.float32(0), weight)


def replay(walk: Mapping[str, Any], seed: int, noise: float) -> tuple[int | None, float]:
    """Search on known times: the trial that came close to the best of all, and the final speed.

    `noise` is the standard deviation of what the logarithms of the estimates are off by beside
    their own error, as on a machine that the cost model does not know.
    """
    rng = np.random.default_rng(seed)
    times = {}
    ranked = []
    for row in walk["rows"]:
        candidate = Candidate(row["kernel"], row["config"])
        ranked.append(Ranked(candidate, row["estimate"] * math.exp(rng.normal(0, noise))))
        times[candidate.key] = row["us"]
    ranked.sort(key=lambda entry: entry.estimate)
    best = min(us for us in times.values() if us)
    search = Search(ranked, [ranked[0].candidate], TRIALS, seed)
    hit = None
    while not search.done:
        for candidate in search.propose(8):
            us = times[candidate.key]
            search.tell(candidate, Outcome("ok" if us else "failed", us))
            if hit is None and us and best / us >= CLOSE:
                hit = len(search.measured)
    return hit, best / (search.best_us or math.inf)


def _replayed(walk: Mapping[str, Any], noise: float) -> str:
    runs = [replay(walk, seed, noise) for seed in range(SEEDS)]
    never = TRIALS + 1
    hits = sorted(never if hit is None else hit for hit, _ in runs)
    speeds = sorted(speed for _, speed in runs)
    shown = [str(h) if h < never else f"not in {TRIALS}" for h in (hits[SEEDS // 2], hits[-1])]
    return f"{shown[0]} ({shown[1]}); {speeds[SEEDS // 2]:.0%} ({speeds[0]:.0%})"


def show(data: Mapping[str, Any]) -> str:
    """Write the tables as Markdown."""
    return "\n".join([*_models_table(data["models"]), "", *_walks_table(data["walks"])])


def _models_table(models: Mapping[str, Any]) -> list[str]:
    if not models:
        return []
    lines = [
        "| 90 % zeros, 1 thread | layers (distinct) | trials | tuning took | "
        "layers: planned -> tuned, ms | whole model: planned -> tuned, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, m in models.items():
        layers = m["layers planned us"] / m["layers tuned us"]
        whole = m["model planned us"] / m["model tuned us"]
        minutes, seconds = divmod(round(m["seconds"]), 60)
        lines.append(
            f"| {name} | {m['layers']} ({m['workloads']}) | {m['measured']} | "
            f"{minutes}:{seconds:02d} | "
            f"{m['layers planned us'] / 1e3:.2f} -> {m['layers tuned us'] / 1e3:.2f} "
            f"({layers:.2f}x) | {m['model planned us'] / 1e3:.2f} -> "
            f"{m['model tuned us'] / 1e3:.2f} ({whole:.2f}x) |"
        )
    first = next(iter(models.values()))
    return [*lines, "", f"{first['cpu']}, {first['date']}."]


def _walks_table(walks: Mapping[str, Any]) -> list[str]:
    if not walks:
        return []
    lines = [
        "| layer, 90 % zeros | candidates | full walk, s | best, us | plan's own choice | "
        + " | ".join(
            f"{title}: trials to {CLOSE:.0%} of the best (worst of {SEEDS} seeds); speed found"
            for title in NOISES
        )
        + " |",
        "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * len(NOISES),
    ]
    for name, walk in walks.items():
        best = min(row["us"] for row in walk["rows"] if row["us"])
        planned = next(
            row["us"]
            for row in walk["rows"]
            if (row["kernel"], row["config"])
            == (walk["planned"]["kernel"], walk["planned"]["config"])
        )
        cells = [_replayed(walk, noise) for noise in NOISES.values()]
        lines.append(
            f"| {name} | {len(walk['rows'])} | {walk['seconds']:.0f} | {best:.1f} | "
            f"{best / planned:.0%} | {' | '.join(cells)} |"
        )
    first = next(iter(walks.values()))
    return [*lines, "", f"{first['cpu']}, {first['date']}."]


MEASURES = {"models": measure_models, "walk": measure_walks}

if __name__ == "__main__":
    sys.exit(main())
