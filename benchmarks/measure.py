"""Measure one section of `kernels.py`: the process that is pinned and has its threads set.

    python benchmarks/measure.py JOB.json         # started by kernels.py

All systems at all densities of a shape are one interleaved run, so that ratios hold.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bars
import csr
import numpy as np
import peers
from cases import (
    QUICK,
    QUICK_DENSITIES,
    SECTIONS,
    Case,
    ConvCase,
    MatmulCase,
    Section,
    file_case,
)
from ours import HAS_PANELS, Choice, Shop, between_panels, layer_of, shuffled
from results import Store
from roofline import as_dict, floors, measure_limits
from timing import Caches, System, cold, hot, rotating
from truth import Truth

from tvm_sparse.bench import cpu_name, versions


@dataclass(frozen=True)
class Effort:
    """How much to measure: seconds of rounds, weights in rotation, calls with cold caches."""

    seconds: float
    copies: int = 8
    cold_rounds: int = 15


QUICK_EFFORT = Effort(0.2, 2, 3)


class Entry:
    """The systems of one density, and what they are."""

    def __init__(self, density: float, weight: np.ndarray) -> None:
        self.density, self.nnz = density, int(np.count_nonzero(weight))
        self.systems: dict[str, System] = {}
        self.what: dict[str, str] = {}
        self.same: dict[str, str] = {}
        self.packed_bytes = 0

    def add(self, name: str, system: System, what: str) -> None:
        """Add a system."""
        self.systems[name], self.what[name] = system, what


class Bench:
    """One section on one machine."""

    def __init__(self, section: Section, effort: Effort) -> None:
        self.section, self.effort = section, effort
        self.shops = {1: Shop(section.target, 1)}
        if section.threads > 1:
            self.shops[section.threads] = Shop(section.target, section.threads)
        self.lanes = section.lanes or self.shops[1].machine.lanes
        if self.lanes not in bars.FLAGS:
            raise RuntimeError("the bars need AVX2 or AVX-512")
        self.library = bars.library(self.lanes)
        self.limits = measure_limits(self.lanes)
        self.caches = Caches(self.library, self.limits.l3_bytes)

    def case(self, case: Case, densities: Sequence[float]) -> dict[str, Any]:
        """Build, check and time all systems of one case."""
        x = case.input()
        dense: dict[str, System] = {}
        entries = []
        for density in densities:
            weight = case.weight(density)
            truth = Truth(case, weight, x)
            if not dense:
                dense = self._peers(case, weight, x, truth)
            entries.append(self._entry(case, density, weight, x, truth))
        systems = {("", name): system for name, system in dense.items()}
        for entry in entries:
            systems |= {(entry.density, name): s for name, s in entry.systems.items()}
        times = self._time({repr(key): system for key, system in systems.items()})
        return {
            "name": case.name,
            "group": case.group,
            "shape": asdict(case),
            "peers": {name: times[repr(("", name))] for name in dense},
            "densities": [self._row(case, entry, x, times) for entry in entries],
        }

    def _time(self, systems: Mapping[str, System]) -> dict[str, dict[str, Any]]:
        effort = self.effort
        found: dict[str, dict[str, Any]] = {name: {} for name in systems}
        runs = {
            "hot": hot(systems, effort.seconds),
            "rotating": rotating(systems, effort.seconds),
            "cold": cold(systems, self.caches, effort.cold_rounds),
        }
        for kind, spreads in runs.items():
            for name, spread in spreads.items():
                found[name][kind] = asdict(spread)
        return found

    def _row(
        self, case: Case, entry: Entry, x: np.ndarray, times: Mapping[str, Any]
    ) -> dict[str, Any]:
        rows = case.m if isinstance(case, MatmulCase) else case.oc
        activations = x.nbytes + 4 * rows * case.columns
        systems = {
            name: {"what": entry.what[name], **times[repr((entry.density, name))]}
            for name in entry.systems
        }
        systems |= {name: systems[other] for name, other in entry.same.items()}
        limit = floors(self.limits, entry.nnz, case.columns, entry.packed_bytes, activations)
        return {
            "density": entry.density,
            "nnz": entry.nnz,
            "systems": systems,
            "floors": as_dict(limit),
        }

    def _peers(
        self, case: Case, weight: np.ndarray, x: np.ndarray, truth: Truth
    ) -> dict[str, System]:
        threads, avx2 = self.section.threads, self.section.name == "avx2"
        # OpenVINO's default precision asks for bf16 instructions, and fails where they are hidden.
        found = peers.dense_peers(case, weight, x, threads, only_float32=avx2)
        if isinstance(case, MatmulCase) and avx2:
            found["openblas"] = peers.openblas(case, weight, x)
        for name, peer in found.items():
            peer.call()
            truth.check(name, peer.output(), name in peers.LOW_PRECISION)
        return {name: System([peer.call], peer.nothing) for name, peer in found.items()}

    def _entry(
        self, case: Case, density: float, weight: np.ndarray, x: np.ndarray, truth: Truth
    ) -> Entry:
        entry = Entry(density, weight)
        for threads, shop in self.shops.items():
            suffix = "" if threads == self.section.threads else " one thread"
            self._add_ours(entry, suffix, shop, layer_of(case, weight, x, threads), truth)
        one_thread = self.section.threads == 1
        if isinstance(case, MatmulCase) and one_thread:
            if HAS_PANELS and case.n >= self.lanes:
                layer = between_panels(layer_of(case, weight, x))
                self._add_ours(entry, " alone", self.shops[1], layer, truth)
            self._add_csr(entry, weight, x, truth)
        if one_thread and self._has_bar(case):
            self._add_bar(entry, case, weight, x, truth)
        return entry

    def _add_ours(self, entry: Entry, suffix: str, shop: Shop, layer: Any, truth: Truth) -> None:
        found = shop.search(layer, truth)
        entry.packed_bytes = entry.packed_bytes or found.packed_bytes
        wanted: dict[str, Choice | None] = {
            "plan": shop.planned(layer),
            "best": found.best,
            "dense": found.dense,
        }
        built: dict[Any, str] = {}
        for name, choice in wanted.items():
            if choice is None:
                continue
            if choice.key in built:
                entry.same[name + suffix] = built[choice.key]
                continue
            built[choice.key] = name + suffix
            copies = self.effort.copies if name != "dense" else 1
            entry.add(name + suffix, shop.system(layer, choice, truth, copies), str(choice))

    def _add_csr(self, entry: Entry, weight: np.ndarray, x: np.ndarray, truth: Truth) -> None:
        kernels = {"scipy csr": csr.scipy_csr(weight, x)}
        if csr.mkl() is not None:
            kernels["mkl csr"] = csr.mkl_csr(weight, x, self.library.nothing)
        for name, kernel in kernels.items():
            kernel.call()
            truth.check(name, kernel.output())
            entry.add(name, System([kernel.call], kernel.nothing, kernel.buffers), name)

    def _has_bar(self, case: Case) -> bool:
        if isinstance(case, ConvCase):
            return case.stride == 1
        # Its narrowest tile is a whole vector.
        return case.n >= self.lanes

    def _add_bar(
        self, entry: Entry, case: Case, weight: np.ndarray, x: np.ndarray, truth: Truth
    ) -> None:
        kind = bars.Matmul if isinstance(case, MatmulCase) else bars.Conv
        first = kind(weight, x, self.lanes).best()
        first.call()
        truth.check(f"the bar {first.tile}", first.output())
        others = [
            bars.Bar(kind(shuffled(weight, seed), x, self.lanes), first.index, first)
            for seed in range(self.effort.copies - 1)
        ]
        every = (first, *others)
        calls, nothing = [bar.call for bar in every], bars.nothing(first)
        entry.add("bar", System(calls, nothing, first.buffers(), every), str(first.tile))


def environment(bench: Bench, cores: Sequence[int]) -> dict[str, Any]:
    """Describe what a section was measured on."""
    found = versions(["onnxruntime", "openvino"])
    if csr.mkl() is not None:
        found["mkl"] = csr.mkl_version()
    found["numpy"] = np.__version__
    return {
        "cpu": cpu_name(),
        "system": platform.system(),
        "target": str(bench.section.target),
        "threads": bench.section.threads,
        "cores": list(cores),
        "versions": found,
        "limits": as_dict(bench.limits),
        "kernels alone": HAS_PANELS,
    }


def run(job: Mapping[str, Any]) -> None:
    """Measure a section's cases and keep each as soon as it is there."""
    section = SECTIONS[job["section"]]
    os.sched_setaffinity(0, job["cores"])
    quick = job["quick"]
    densities = job["densities"] or (QUICK_DENSITIES if quick else section.densities)
    cases = QUICK[section.name] if quick else section.cases
    chosen = [(c, densities) for c in cases]
    if job.get("smtx"):
        found = [file_case(path, job["tokens"]) for path in job["smtx"]]
        chosen = [(case, (density,)) for case, density in found]
    words = job["shapes"]
    chosen = [pair for pair in chosen if not words or any(word in pair[0].name for word in words)]
    bench = Bench(section, QUICK_EFFORT if quick else Effort(job["seconds"]))
    store = Store(Path(job["json"]))
    for number, (case, densities) in enumerate(chosen, 1):
        start = time.perf_counter()
        print(f"{section.name} {number}/{len(chosen)} {case.name} ", end="", flush=True)
        measured = bench.case(case, densities)
        store.add(section.name, environment(bench, job["cores"]), measured)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
