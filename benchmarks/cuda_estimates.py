"""What the cost model expects of GPU kernels, and what binds them: the table of docs/cuda.md.

    python benchmarks/cuda_estimates.py

Needs no GPU: these are estimates. A dense library is taken to reach 80 % of the tensor cores' rate,
in float32 of the float32 units' (as cuBLAS has it without TF32), or 80 % of the memory's.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cuda_cases import Case, matching
from networks import rewrite_page
from tvm_sparse.schedules.cuda import cost
from tvm_sparse.schedules.lookup import templates_for

from tvm_sparse.dtypes import numpy_dtype
from tvm_sparse.files import write_text
from tvm_sparse.profile import SparsityProfile, profile_weight
from tvm_sparse.targets import CudaMachine, machine_of, resolve_target
from tvm_sparse.workload import MatmulGeometry

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda_estimates.json"
PAGE = ROOT / "docs" / "cuda.md"
MARKS = ("<!-- estimates:begin -->", "<!-- estimates:end -->")
TARGETS = ("cuda-sm80", "cuda-sm90")

# Cases of the benchmark, by how their names begin.
SHOWN = (
    "tile-wise",
    "2:4/4096x4096x4096",
    "2:4/768x3072x12800",
    "v:n:m/64:2:8/4096x4096x4096",
    "v:n:m/64:2:16/4096x4096x4096",
    "block/32x32/4096x4096x4096",
    "block/16x16/4096x4096x4096/90",
    "block/16x1/4096x4096x4096/90",
    "unstructured/",
    "cuda-cores/768x768x12800",
    "decode/4096x4096x16",
    "decode/28672x7168x16",
    "implicit-alexnet/*/90",
    "implicit-resnet50/*/90",
    "direct-resnet50/*/90",
    "2:4-1x1/1x1_256-1024*",
)


@dataclass(frozen=True)
class Estimate:
    """What is expected of a case on a GPU.

    Attributes
    ----------
    us, dense_us : float
        Microseconds of the fastest kernel of the case's format, and of a dense library.
    binds : str
        What takes the kernel the longest.
    """

    us: float
    dense_us: float
    binds: str
    kernel: str
    config: dict[str, Any]


def estimate(case: Case, profile: SparsityProfile, machine: CudaMachine) -> Estimate | None:
    """Estimate a case at its best configuration; None where no kernel takes it."""
    found = [
        (template.estimate(case.workload, machine, profile, config), template, config)
        for template in templates_for(machine)
        if template.format == case.format and template.takes(case.workload, machine)
        for config in template.space(case.workload, machine)
    ]
    if not found:
        return None
    us, template, config = min(found, key=lambda entry: entry[0])
    events = template.events(case.workload, machine, profile, config)
    dense = dense_microseconds(case, machine)
    return Estimate(
        round(us, 1), round(dense, 1), cost.binds(events, machine), template.name, dict(config)
    )


def dense_microseconds(case: Case, machine: CudaMachine) -> float:
    """Estimate a dense library: 80 % of what binds it."""
    a_cycle = machine.cores if case.dtype == "float32" else machine.tensor_macs
    rate = machine.multiprocessors * a_cycle * machine.gigahertz * 1e3
    rows, columns = case.geometry.weight_shape
    elements = rows * columns + cost.input_elements(case.workload) + rows * case.columns
    moved = elements * numpy_dtype(case.dtype).itemsize / (machine.memory_gbytes * 1e3)
    return cost.LAUNCH_US + max(case.geometry.macs() / rate, moved) / cost.REACHED


def table(results: dict[str, dict[str, Any]]) -> str:
    """Write the table: microseconds, how many times a dense library, and what binds."""
    lines = [f"| us (times a dense library; what binds) | {' | '.join(TARGETS)} |"]
    lines.append(f"| --- |{' ---: |' * len(TARGETS)}")
    for name, by_target in results.items():
        cells = [
            f"{e['us']:.0f} ({e['dense_us'] / e['us']:.1f}x; {e['binds']})"
            for e in by_target.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    cases = {case.name: case for shown in SHOWN for case in matching(shown)}
    cases |= {
        f"{name}, features in rows": replace(case, geometry=_by_features(case))
        for name, case in cases.items()
        if case.group == "tile-wise"
    }
    results: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        profile = profile_weight(case.weight())
        found = {target: estimate(case, profile, _gpu(target)) for target in TARGETS}
        if None not in found.values():
            results[name] = {target: asdict(e) for target, e in found.items() if e is not None}
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    print(table(results))
    rewrite_page(PAGE, table(results), MARKS)
    return 0


def _by_features(case: Case) -> MatmulGeometry:
    assert isinstance(case.geometry, MatmulGeometry)
    return replace(case.geometry, layout="features")


def _gpu(target: str) -> CudaMachine:
    machine = machine_of(resolve_target(target))
    assert isinstance(machine, CudaMachine)
    return machine


if __name__ == "__main__":
    sys.exit(main())
