"""Fit the prices of `schedules/x86/cost.py` to measurements of the kernels on this machine.

    python benchmarks/fit_cost.py [--json FILE] [--cpu 0]

Run on an idle machine. Prints the fitted prices, and how far the estimates are off, by workload.
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

from tvm_sparse.formats import FORMATS
from tvm_sparse.planner import template_named
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
WEIGHTS = 12
# What calling a kernel from Python costs.
CALL_MICROSECONDS = 1.0
DENSITIES = [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]


def workloads():
    for m, k, n in MATMULS:
        yield Workload("matmul", MatmulGeometry(m, k, n)), (k, m)
    for ic, oc, size, kernel in CONVS:
        pad = (kernel // 2,) * 4
        geometry = Conv2dGeometry(1, ic, size, size, oc, (kernel, kernel), padding=pad)
        yield Workload("conv2d", geometry), (oc, ic, kernel, kernel)


def pruned(shape, density):
    w = trained_like(np.random.default_rng(0), shape, 0.05)
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
    while len(rounds) < 9 or sum(rounds) < 0.05:
        start = time.perf_counter()
        for call in calls:
            kernel(*call)
        rounds.append(time.perf_counter() - start)
    return float(np.median(rounds)) / len(calls) * 1e6 - CALL_MICROSECONDS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the measurements there")
    parser.add_argument("--reuse", type=Path, help="fit measurements that were made before")
    parser.add_argument("--cpu", type=int, default=0)
    options = parser.parse_args()
    target = resolve_target("native")
    machine = machine_of(target, 1)
    rows = json.loads(options.reuse.read_text()) if options.reuse else []
    if not rows:
        os.sched_setaffinity(0, {options.cpu})
        rows = list(measurements(machine, target))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    fit(rows)


def measurements(machine, target):
    for workload, shape in workloads():
        for density in [1.0, *DENSITIES]:
            weight = pruned(shape, density) if density < 1 else pruned(shape, 0.999999)
            profile = profile_weight(matrix_view(weight, workload.op))
            names = ["dense_panels", "gemv"] if density == 1 else ["register_tile", "sliced_rows"]
            for name in names:
                template = template_named(name)
                if not template.supports(workload, machine):
                    continue
                space = template.space(workload, machine)
                for config in space[:4]:
                    config = {**config, "threads": 1, "parts": 1}
                    if name == "register_tile":
                        events = cost.sparse_events(workload, machine, profile, config)
                    elif name == "sliced_rows":
                        events = cost.sliced_events(workload, machine, profile, config)
                    elif name == "gemv":
                        events = cost.gemv_events(workload, machine)
                    else:
                        events = cost.dense_events(workload, machine, config)
                    us = measure(template, workload, machine, target, weight, config)
                    row = {
                        "kernel": name,
                        "op": workload.op,
                        "geometry": asdict(workload.geometry),
                        "density": density,
                        "config": dict(config),
                        "us": us,
                        "events": dict(events),
                    }
                    guess = cost.microseconds(events, workload, machine, config)
                    print(
                        f"{name:14s} {shape} {density:5.2f} mr{config.get('mr')} "
                        f"nt{config.get('nt')} {us:8.1f} us, estimated {guess:8.1f}",
                        flush=True,
                    )
                    yield row


def fit(rows):
    """Solve for the prices that minimise relative errors; prices stay positive."""
    names = list(asdict(cost.PRICES))
    gigahertz = 4.0
    matrix = np.array([[row["events"].get(name, 0.0) for name in names] for row in rows])
    measured = np.array([row["us"] for row in rows]) * gigahertz * 1e3
    start = np.array([asdict(cost.PRICES)[name] for name in names])
    # A mild pull towards the prices at hand decides what the measurements leave open.
    pull = 0.02 * np.diag(1 / start)
    solution = lsq_linear(
        np.vstack([matrix / measured[:, None], pull]),
        np.concatenate([np.ones(len(rows)), 0.02 * np.ones(len(names))]),
        bounds=(0.15 * start, np.inf),
    )
    for name, old, new in zip(names, start, solution.x, strict=True):
        print(f"{name:14s} {old:8.3f} -> {new:8.3f}")
    ratio = matrix @ solution.x / measured
    for kernel in sorted({row["kernel"] for row in rows}):
        own = np.array([r for r, row in zip(ratio, rows, strict=True) if row["kernel"] == kernel])
        off = np.abs(np.log(own))
        print(
            f"{kernel:14s} off by {np.expm1(np.median(off)):.0%} (median), "
            f"{np.expm1(off.max()):.0%} (worst)"
        )


if __name__ == "__main__":
    main()
