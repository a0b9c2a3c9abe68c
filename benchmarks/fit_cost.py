"""Fit the prices of `schedules/x86/cost.py` to measurements of the kernels on this machine.

    python benchmarks/fit_cost.py [--measure] [--cpu 0]

With --measure (on an idle machine, some ten minutes) times the kernels and appends the times to
results/kernel_times.jsonl. Prints the fitted prices, how far estimates are off, and for every layer
and density what the plan would choose: its speed over dense, and over the best choice.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

# Before TVM starts its threads.
os.environ["TVM_NUM_THREADS"] = "1"

import tvm
from scipy.optimize import lsq_linear
from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.x86 import cost
from tvm_sparse.schedules.x86.templates import narrowed

from tvm_sparse.calibration import calibrated
from tvm_sparse.cpu_features import processor_name
from tvm_sparse.formats import FORMATS
from tvm_sparse.planner import SPARSE_MARGIN, template_named
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload
from tvm_sparse.zoo import trained_like

MATMULS = [
    (768, 768, 128),
    (3072, 768, 128),
    (768, 3072, 128),
    (512, 512, 192),
    (64, 256, 3136),
    (1024, 1024, 64),
    (2048, 512, 48),
    (768, 768, 16),
    (768, 768, 32),
    (768, 768, 1),
    (768, 768, 4),
    (768, 768, 8),
    (768, 3072, 1),
    (768, 768, 384),
]
CONVS = [
    (64, 64, 56, 3),
    (128, 128, 28, 3),
    (256, 256, 14, 3),
    (512, 512, 7, 3),
    (64, 256, 56, 1),
    (256, 64, 56, 1),
    (512, 128, 28, 1),
    (256, 1024, 14, 1),
    (512, 2048, 7, 1),
    (32, 64, 112, 1),
    (1024, 1024, 7, 1),
]
# Distinct weights in rotation: together beyond L2, and other loop lengths every time.
WEIGHTS = 8
# What calling a kernel from Python costs.
CALL_MICROSECONDS = 1.0
DENSITIES = [0.5, 0.3, 0.1, 0.05, 0.02]
# Configurations of each template that are measured for a layer and density, other ones each time.
CONFIGS = 3


# What no processor goes below that issues two multiply-adds and two loads a cycle. They keep the
# fit from explaining one kernel's noise by another one's price.
FLOORS = {
    "fma": 0.5,
    "nonzero": 0.3,
    "load": 0.2,
    "far_load": 0.2,
    "loop": 3.0,
    "mask": 0.5,
    "lone_fma": 0.5,
    "slice": 5.0,
    "dense_fma": 1.0,
    "gemv_fma": 0.5,
    "pack": 1.0,
    "copy": 1.0,
    "store": 1.0,
    "write": 0.7,
    "unit": 20.0,
}
RESULTS = Path(__file__).parent / "results" / "kernel_times.jsonl"
DENSE = ("dense_panels", "gemv")
SPARSE = ("register_tile", "sliced_rows")
EVENTS = {
    "dense_panels": lambda w, m, p, c: cost.dense_events(w, m, c),
    "gemv": lambda w, m, p, c: cost.gemv_events(w, m),
    "register_tile": cost.sparse_events,
    "sliced_rows": lambda w, m, p, c: cost.sliced_events(w, narrowed(w, m), p, c),
}


def workloads():
    for m, k, n in MATMULS:
        yield Workload("matmul", MatmulGeometry(m, k, n)), (k, m)
    for ic, oc, size, kernel in CONVS:
        pad = (kernel // 2,) * 4
        geometry = Conv2dGeometry(1, ic, size, size, oc, (kernel, kernel), padding=pad)
        yield Workload("conv2d", geometry), (oc, ic, kernel, kernel)


def pruned(shape, density):
    w = trained_like(np.random.default_rng(0), shape, 0.05)
    if density == 1:
        return w
    cut = np.quantile(np.abs(w), 1 - density)
    return np.where(np.abs(w) < cut, np.float32(0), w)


def measure(template, workload, machine, target, weight, config):
    """Median microseconds of one kernel, called with other weights each time, as in a network."""
    rng = np.random.default_rng(1)
    matrix = matrix_view(weight, workload.op)
    rows, columns = matrix.shape
    packs = [
        FORMATS[template.format].pack(
            matrix[rng.permutation(rows)][:, rng.permutation(columns)], config
        )
        for _ in range(WEIGHTS)
    ]
    function = template.build(workload, machine, packs[0], config).with_attr("global_symbol", "k")
    kernel = tvm.compile(function, target)["k"]
    g = workload.geometry
    if workload.op == "matmul":
        x, y = (g.n, g.k), (g.n, g.m)
    else:
        x = (1, g.in_channels, g.in_height, g.in_width)
        y = (1, g.out_channels, g.out_height, g.out_width)
    data = tvm.runtime.tensor(rng.standard_normal(x).astype("float32"))
    out = tvm.runtime.tensor(np.zeros(y, "float32"))
    calls = [
        (data, *(tvm.runtime.tensor(a) for a in template.arguments(workload, packed)), out)
        for packed in packs
    ]
    for call in calls:
        kernel(*call)
    rounds = []
    while len(rounds) < 5 or sum(rounds) < 0.04:
        start = time.perf_counter()
        for call in calls:
            kernel(*call)
        rounds.append(time.perf_counter() - start)
    return float(np.median(rounds)) / len(calls) * 1e6 - CALL_MICROSECONDS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=RESULTS, help="JSON lines of measurements")
    parser.add_argument("--measure", action="store_true", help="measure; goes on where it stopped")
    parser.add_argument("--cpu", type=int, default=0)
    options = parser.parse_args()
    if options.measure:
        os.sched_setaffinity(0, {options.cpu})
        measure_all(options.file)
    rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    gigahertz = rows[0]["gigahertz"]
    prices = fit(rows, gigahertz)
    judge(rows, prices, gigahertz)


def measure_all(file):
    target = resolve_target("native")
    machine = calibrated(machine_of(target, 1), target)
    done = file.read_text().splitlines() if file.exists() else []
    keys = {json.loads(line)["key"] for line in done}
    with file.open("a") as stream:
        for key, workload, shape, density, name, config in cases(machine):
            if key in keys:
                continue
            weight = pruned(shape, density)
            us = measure(template_named(name), workload, machine, target, weight, config)
            row = {
                "key": key,
                "cpu": processor_name(),
                "gigahertz": machine.gigahertz,
                "kernel": name,
                "density": density,
                "us": round(us, 2),
            }
            print(f"{key} {us:.1f} us", flush=True)
            stream.write(json.dumps(row) + "\n")
            stream.flush()


def cases(machine, all_configs=False):
    """List what to measure, or everything that may have been measured."""
    for workload, shape in workloads():
        for density in [1.0, *DENSITIES]:
            names = DENSE if density == 1 else SPARSE
            for name in names:
                template = template_named(name)
                if not template.supports(workload, machine):
                    continue
                space = template.space(workload, machine)
                for config in space if all_configs else chosen(space, density):
                    tile = f"{config.get('mr')}x{config.get('nt')}x{config.get('kb')}"
                    columns = getattr(workload.geometry, "n", None)
                    where = "x".join(map(str, shape)) + (f"@{columns}" if columns else "")
                    if not columns:
                        where += f"@{workload.geometry.in_height}"
                    key = f"{workload.op} {where} density {density} {name} {tile}"
                    yield key, workload, shape, density, name, config


def chosen(space, density):
    """Take some configurations of a space: the first, and others that change with the density."""
    step = DENSITIES.index(density) if density in DENSITIES else 0
    others = list(space[1:])
    turned = others[step % max(1, len(others)) :] + others[: step % max(1, len(others))]
    return [space[0], *turned[: CONFIGS - 1]]


def with_events(rows, machine):
    """Count each measured case's events as the cost model counts them today."""
    known = {row["key"]: row for row in rows}
    found = []
    for key, workload, shape, density, name, config in cases(machine, all_configs=True):
        if key not in known:
            continue
        profile = profile_weight(matrix_view(pruned(shape, density), workload.op))
        events = EVENTS[name](workload, machine, profile, config)
        found.append({**known[key], "events": dict(events), "layer": key.split(" density")[0]})
    return found


def fit(rows, gigahertz):
    """Solve for the prices that minimise relative errors; prices stay positive."""
    machine = machine_of(resolve_target("native"), 1)
    rows[:] = with_events(rows, machine)
    names = list(asdict(cost.PRICES[machine.fma_per_cycle]))
    matrix = np.array([[row["events"].get(name, 0.0) for name in names] for row in rows])
    measured = np.array([row["us"] for row in rows]) * gigahertz * 1e3
    prices = asdict(cost.PRICES[machine.fma_per_cycle])
    start = np.array([max(prices[name], FLOORS.get(name, 0.1)) for name in names])
    # A mild pull towards the prices at hand decides what the measurements leave open.
    pull = 0.05 * np.diag(1 / start)
    solution = lsq_linear(
        np.vstack([matrix / measured[:, None], pull]),
        np.concatenate([np.ones(len(rows)), 0.05 * np.ones(len(names))]),
        bounds=([FLOORS.get(name, 0.1) for name in names], np.inf),
    )
    for name, old, new in zip(names, start, solution.x, strict=True):
        print(f"    {name}: float = {new:.3g}  # was {old:.3g}")
    return dict(zip(names, solution.x, strict=True))


def judge(rows, prices, gigahertz):
    """Say how far estimates are off, and what choosing by them costs."""
    layers = {}
    for row in rows:
        cycles = sum(prices[name] * count for name, count in row["events"].items())
        row["estimate"] = cycles / (gigahertz * 1e3)
        layers.setdefault(row["layer"], []).append(row)
    for kernel in sorted({row["kernel"] for row in rows}):
        off = [abs(np.log(r["estimate"] / r["us"])) for r in rows if r["kernel"] == kernel]
        print(
            f"{kernel}: off by {np.expm1(np.median(off)):.0%} (median), "
            f"{np.expm1(max(off)):.0%} (worst) of {len(off)}"
        )
    for layer, own in layers.items():
        dense = [row for row in own if row["density"] == 1]
        best_dense = min(row["us"] for row in dense)
        for density in DENSITIES:
            sparse = [row for row in own if row["density"] == density]
            if not sparse:
                continue
            chosen = min(dense, key=lambda row: row["estimate"])
            promising = min(sparse, key=lambda row: row["estimate"])
            if promising["estimate"] < SPARSE_MARGIN * chosen["estimate"]:
                chosen = promising
            best = min(row["us"] for row in [*sparse, *dense])
            loss, against = chosen["us"] / best, chosen["us"] / best_dense
            mark = " <-- slower than dense" if against > 1.1 else ""
            speed = best_dense / chosen["us"]
            print(
                f"{layer:32s} {density:4.2f} {chosen['kernel']:14s} {speed:5.2f}x dense, ", end=""
            )
            print(f"{loss:.2f} of the best{mark}")


if __name__ == "__main__":
    main()
