"""Measure the time per item of modules whose batch or length is symbolic, and look for cliffs.

    python benchmarks/sizes.py         # writes benchmarks/results/sizes.json, docs/networks.md

One module is compiled for every size. Sizes are called in turn, in rounds; figures are medians. The
jump is the time per item over that of the next smaller size which was measured; sizes lie close
together around those at which vectors and panels end.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from networks import PAGE, pruned, rewrite_page

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.bench import cpu_name, pinned
from tvm_sparse.files import write_text

RESULTS = Path(__file__).resolve().parent / "results" / "sizes.json"
BEGIN, END = "<!-- sizes:begin -->", "<!-- sizes:end -->"
SPARSITY, SECONDS, MOST = 0.9, 20.0, 1.3

_EDGES = (16, 32, 48, 64, 80, 96, 128, 192, 256, 384)
LENGTHS = sorted(
    {*range(1, 18), *(e + d for e in _EDGES for d in (-1, 0, 1)), 24, 40, 56, 511, 512}
)
BATCHES = [*range(1, 18), 24, 31, 32, 33, 47, 48, 49, 63, 64]


@dataclass(frozen=True)
class Subject:
    """A network of symbolic size, its input at a size, and the sizes to measure."""

    build: Callable[[], onnx.ModelProto]
    shape: Callable[[int], tuple[int, ...]]
    sizes: list[int]


SUBJECTS: dict[str, Subject] = {
    "BERT-base, 2 layers: length": Subject(
        partial(zoo.bert_encoder, layers=2, symbolic=True), lambda n: (1, n, 768), LENGTHS
    ),
    "BERT-base, 2 layers: batches of 16 tokens": Subject(
        partial(zoo.bert_encoder, layers=2, symbolic=True), lambda n: (n, 16, 768), BATCHES
    ),
    "three layers of 768x768: batch": Subject(
        partial(zoo.mlp, "batch", (768, 768, 768, 768)), lambda n: (n, 768), [*range(1, 65)]
    ),
    "MobileNetV1: batch": Subject(
        partial(zoo.mobilenet_v1, batch="batch"),
        lambda n: (n, 3, 224, 224),
        [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64],
    ),
}


def measure(subject: Subject) -> dict[int, float]:
    """Return microseconds per item by size."""
    model = subject.build()
    sparse = pruned(model, SPARSITY)
    module = ts.compile(sparse, threads=1, check=False)
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal(subject.shape(n)).astype("float32") for n in subject.sizes}
    times: dict[int, list[float]] = {n: [] for n in subject.sizes}
    with pinned(1):
        for n in subject.sizes:
            module(inputs[n])
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(times[subject.sizes[0]]) < 3:
            for n in subject.sizes:
                times[n].append(_call(module, inputs[n]))
    return {n: 1e6 * statistics.median(each) / n for n, each in times.items()}


def _call(module: Any, x: np.ndarray) -> float:
    started = time.perf_counter()
    module(x)
    return time.perf_counter() - started


def jumps(times: dict[int, float]) -> dict[int, float]:
    """Return each size's time per item over that of the one before."""
    sizes = list(times)
    return {b: times[b] / times[a] for a, b in itertools.pairwise(sizes)}


def table(results: dict[str, dict[int, float]]) -> str:
    """Write the results as Markdown."""
    lines = [
        "| 90 % zeros, 1 thread | us per item at some sizes | largest jump | jumps over 1.3 |",
        "| --- | --- | ---: | --- |",
    ]
    for name, times in results.items():
        some = [n for n in (1, 4, 8, 16, 17, 32, 64, 128, 256, 512) if n in times]
        shown = ", ".join(f"{n}: {times[n]:.0f}" for n in some)
        found = jumps(times)
        worst = max(found, key=lambda n: found[n])
        over = ", ".join(f"{n}: {jump:.2f}" for n, jump in found.items() if jump > MOST)
        lines.append(f"| {name} | {shown} | {found[worst]:.2f} (at {worst}) | {over or 'none'} |")
    return "\n".join(lines)


def main() -> int:
    results = {}
    for name, subject in SUBJECTS.items():
        results[name] = measure(subject)
        print(table({name: results[name]}).splitlines()[-1], flush=True)
    data = {"cpu": cpu_name(), "us per item": results}
    write_text(RESULTS, json.dumps(data, indent=1) + "\n")
    rewrite_page(PAGE, table(results), (BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
