"""Fit the prices of `schedules/x86/cost.py` to measurements of the kernels on this machine.

    python benchmarks/fit_cost.py [--measure] [--cpu 0] [--leave-one-out]

With --measure (on an idle machine, some ten minutes) times the kernels and appends the times to
results/kernel_times.jsonl. Prints the fitted prices, how far estimates are off, and for every layer
and density what the plan would choose: its speed over dense, and over the best choice. With
--leave-one-out also how far estimates are off for layers that the prices were not fitted to.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

# Before TVM starts its threads.
os.environ["TVM_NUM_THREADS"] = "1"

from tvm_sparse.schedules.base import matrix_view
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86.cost import PRICE_NAMES, prices_of

from tvm_sparse.cpu_features import processor_name
from tvm_sparse.planner import SPARSE_MARGIN
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.tuning.calibrate import measure_gigahertz
from tvm_sparse.tuning.core_speed import call_microseconds
from tvm_sparse.tuning.kernel_times import build_timer, shuffled
from tvm_sparse.tuning.prices import (
    Sample,
    estimate,
    events_of,
    fit_prices,
    leave_one_group_out,
)
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
    (768, 768, 2),
    (768, 768, 12),
    (3072, 768, 4),
    (1000, 2048, 1),
    (2048, 1024, 8),
    (256, 1024, 192),
    (771, 769, 100),
    (320, 320, 1024),
]
# Channels in, channels out, rows of pixels, kernel; also stride and images where they are not 1.
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
    (256, 256, 28, 3, 2),
    (256, 512, 28, 1, 2),
    (128, 128, 28, 3, 1, 4),
    (64, 256, 56, 1, 1, 8),
]
DENSITIES = [0.5, 0.3, 0.1, 0.05, 0.02]
# Configurations of each template that are measured for a layer and density, other ones each time.
CONFIGS = 3


RESULTS = Path(__file__).parent / "results" / "kernel_times.jsonl"
DENSE = ("dense_panels", "gemv", "channel_vectors")
SPARSE = ("register_tile", "sliced_rows")


def workloads():
    for m, k, n in MATMULS:
        yield Workload("matmul", MatmulGeometry(m, k, n)), (k, m)
    for ic, oc, size, kernel, *rest in CONVS:
        stride, images = (*rest, *(1, 1)[len(rest) :])
        geometry = Conv2dGeometry(
            images,
            ic,
            size,
            size,
            oc,
            (kernel, kernel),
            strides=(stride, stride),
            padding=(kernel // 2,) * 4,
        )
        yield Workload("conv2d", geometry), (oc, ic, kernel, kernel)


def pruned(shape, density):
    w = trained_like(np.random.default_rng(0), shape, 0.05)
    if density == 1:
        return w
    cut = np.quantile(np.abs(w), 1 - density)
    return np.where(np.abs(w) < cut, np.float32(0), w)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=RESULTS, help="JSON lines of measurements")
    parser.add_argument("--measure", action="store_true", help="measure; goes on where it stopped")
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument(
        "--leave-one-out", action="store_true", help="errors on layers that are left out of the fit"
    )
    options = parser.parse_args()
    if options.measure:
        os.sched_setaffinity(0, {options.cpu})
        measure_all(options.file)
    rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    machine = replace(machine_of(resolve_target("native"), 1), gigahertz=rows[0]["gigahertz"])
    rows = with_samples(rows, machine)
    fitted = fit(rows, machine)
    judge(rows, fitted)
    if options.leave_one_out:
        leave_out([row["sample"] for row in rows], machine)


def measure_all(file):
    target = resolve_target("native")
    machine = machine_of(target, 1)
    machine = replace(machine, gigahertz=measure_gigahertz(target, machine))
    call = call_microseconds(target)

    def timer_of(name, workload, config):
        return build_timer(template_named(name), workload, machine, target, config, call)

    done = file.read_text().splitlines() if file.exists() else []
    keys = {json.loads(line)["key"] for line in done}
    timers = {}
    with file.open("a") as stream:
        for key, workload, shape, density, name, config in cases(machine):
            if key in keys:
                continue
            kernel = (workload, name, repr(config))
            if kernel not in timers:
                timers = {kernel: timer_of(name, workload, config)}
            weight = matrix_view(pruned(shape, density), workload.op)
            us = timers[kernel].microseconds(shuffled(weight))
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
    """List what to measure, or everything that may have been measured; kernel by kernel."""
    for workload, shape in workloads():
        for name in (*DENSE, *SPARSE):
            template = template_named(name)
            if not template.takes(workload, machine):
                continue
            space = template.space(workload, machine)
            for config in space:
                for density in [1.0] if name in DENSE else DENSITIES:
                    if all_configs or config in chosen(space, density):
                        key = key_of(workload, shape, density, name, config)
                        yield key, workload, shape, density, name, config


def key_of(workload, shape, density, name, config):
    """Name a case in the file of results."""
    tile = f"{config.get('mr')}x{config.get('nt', config.get('pixels'))}x{config.get('kb')}"
    where, geometry = "x".join(map(str, shape)), workload.geometry
    if workload.op == "matmul":
        where += f"@{geometry.n}"
    else:
        stride, images = geometry.strides[0], geometry.batch
        where += f"@{geometry.in_height}" + (f"/{stride}" if stride > 1 else "")
        where += f" b{images}" if images > 1 else ""
    return f"{workload.op} {where} density {density} {name} {tile}"


def chosen(space, density):
    """Take some configurations of a space: the first, and others that change with the density."""
    step = DENSITIES.index(density) if density in DENSITIES else 0
    others = list(space[1:])
    turned = others[step % max(1, len(others)) :] + others[: step % max(1, len(others))]
    return [space[0], *turned[: CONFIGS - 1]]


def with_samples(rows, machine):
    """Count each measured case's events as the cost model counts them today."""
    known = {row["key"]: row for row in rows}
    found = []
    for key, workload, shape, density, name, config in cases(machine, all_configs=True):
        if key not in known:
            continue
        profile = profile_weight(matrix_view(pruned(shape, density), workload.op))
        events = events_of(name, workload, machine, profile, config)
        layer = key.split(" density")[0]
        # Every run has measured the clock anew.
        us = known[key]["us"] * known[key]["gigahertz"] / machine.gigahertz
        sample = Sample(name, workload, events, us, layer, density)
        found.append({**known[key], "sample": sample, "layer": layer})
    return found


def fit(rows, machine):
    """Solve for the prices that minimise relative errors; return a machine that has them."""
    start = prices_of(machine)
    prices = fit_prices([row["sample"] for row in rows], machine)
    for name in PRICE_NAMES:
        print(f"    {name}: float = {prices[name]:.3g}  # was {getattr(start, name):.3g}")
    return replace(machine, prices=tuple(prices.items()))


def leave_out(samples, machine):
    """Say how far estimates are off for layers that the prices were not fitted to."""
    errors = leave_one_group_out(samples, machine)
    print(f"left out: off by {errors.median:.1%} (median) of {len(samples)}", end="")
    for name, off in errors.by_template().items():
        print(f", {name} {off:.1%}", end="")
    print()
    best = [abs(error) for error in errors.best.values()]
    print(
        f"left out: the best kernel's time off by {errors.median_best:.1%} (median), "
        f"{np.quantile(best, 0.9):.1%} (nine tenths) of {len(best)} layers and densities"
    )


def judge(rows, fitted):
    """Say how far estimates are off, and what choosing by them costs."""
    layers = {}
    for row in rows:
        row["estimate"] = estimate(row["sample"], fitted)
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
