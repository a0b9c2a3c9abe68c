"""Say where the time of a network goes, kind by kind, and what bounds each.

    python benchmarks/time_budget.py      # writes results/time_budget.json, docs/networks.md

Times are those of `module.profile`, which stops between kernels. The floor is what the
multiply-adds that cannot be left out (nonzeros times columns, products of attention) take at the
rate of one core, measured in the same process; what has none is bound by memory or latency.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import NETWORKS, PAGE, pruned, rewrite_page
from roofline import measure_limits
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.passes.fuse_epilogue import Body
from tvm_sparse.passes.match_attention import match_attention

import tvm_sparse as ts
from tvm_sparse.bench import cpu_name, pinned
from tvm_sparse.files import write_text
from tvm_sparse.targets import machine_of, resolve_target

RESULTS = Path(__file__).resolve().parent / "results" / "time_budget.json"
BEGIN, END = "<!-- budget:begin -->", "<!-- budget:end -->"
SPARSITY = 0.9

# Kind -> the beginnings of its kernels' names, the first that fits.
KINDS: dict[str, tuple[str, ...]] = {
    "sparse layers": ("sliced_ell_", "register_tiled_"),
    "dense layers": ("dense_", "plain_"),
    "attention": ("attention_", "batch_matmul", "softmax"),
    "layer norm": ("layer_norm",),
    "pooling and means": ("max_pool", "avg_pool", "mean_", "sum_"),
    "into panels and back": ("pack_panels", "unpack_panels", "permute_dims"),
    "the virtual machine": ("vm.",),
    "elementwise and other": ("",),
}


def kind_of(symbol: str) -> str:
    """Name a kernel's kind."""
    return next(kind for kind, names in KINDS.items() if symbol.startswith(names))


def measure(model: onnx.ModelProto, rate: float) -> dict[str, Any]:
    """Profile a network; return microseconds and floors by kind."""
    sparse = pruned(model, SPARSITY)
    loaded = ts.load(sparse)
    module = ts.compile(loaded, threads=1, check=False)
    x = np.random.default_rng(0).standard_normal(module.inputs[0].shape).astype("float32")
    profile = module.profile(x)
    times = dict.fromkeys(KINDS, 0.0)
    for row in profile.kernels:
        times[kind_of(row.symbol)] += row.microseconds
    sparse = {row.name: row.format != "dense" for row in module.report.layers}
    floors = {"sparse layers": 0.0, "dense layers": 0.0, "attention": 0.0}
    for fused in collect_weights(loaded):
        geometry = fused.site.workload.geometry
        if geometry is not None:
            weight = loaded.params[fused.site.param]
            columns = geometry.macs() / np.prod(geometry.weight_shape)
            work = np.count_nonzero(weight) if sparse[fused.site.name] else weight.size
            kind = "sparse layers" if sparse[fused.site.name] else "dense layers"
            floors[kind] += 2 * work * columns / rate / 1e3
    for attention in match_attention(Body(loaded)):
        g = attention.geometry
        macs = 2 * g.batch * g.heads * g.tokens**2 * g.depth
        floors["attention"] += 2 * macs / rate / 1e3
    return {"whole": profile.total_microseconds, "times": times, "floors": floors}


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [
        f"| ms (floor of its multiply-adds) | {' | '.join(results)} |",
        "| --- |" + " ---: |" * len(results),
    ]
    for kind in KINDS:
        cells = list(_cells(kind, results.values()))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    wholes = [f"{entry['whole'] / 1e3:.2f}" for entry in results.values()]
    return "\n".join([*lines, f"| whole run, not stopped between kernels | {' | '.join(wholes)} |"])


def _cells(kind: str, entries: Iterable[dict[str, Any]]) -> Iterable[str]:
    for entry in entries:
        time, floor = entry["times"][kind], entry["floors"].get(kind, 0.0)
        floor_text = f" ({floor / 1e3:.2f})" if floor else ""
        yield f"{time / 1e3:.2f}{floor_text}" if time else ""


def main() -> int:
    with pinned(1):
        lanes = machine_of(resolve_target("native"), 1).lanes
        rate = measure_limits(lanes).fma_gflops
        results = {network.title: measure(network.build(), rate) for network in NETWORKS}
    data = {"cpu": cpu_name(), "fma_gflops": rate, "networks": results}
    write_text(RESULTS, json.dumps(data, indent=1) + "\n")
    text = f"{table(results)}\n\n{cpu_name()}, one thread, {rate:.0f} GFLOP/s; 90 % zeros."
    print(text)
    rewrite_page(PAGE, text, (BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
