"""What the cost model expects of GPU kernels, and what binds them: the table of docs/cuda.md.

    python benchmarks/cuda_estimates.py

Needs no GPU: these are estimates. The dense column is the peak of the float32 units, which no
library reaches.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from networks import rewrite_page
from tvm_sparse.schedules.cuda import cost
from tvm_sparse.schedules.lookup import templates_for

from tvm_sparse.files import write_text
from tvm_sparse.profile import profile_weight
from tvm_sparse.targets import CudaMachine, machine_of, resolve_target
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cuda_estimates.json"
PAGE = ROOT / "docs" / "cuda.md"
MARKS = ("<!-- estimates:begin -->", "<!-- estimates:end -->")
TARGETS = ("cuda-sm80", "cuda-sm90")
DENSITIES = (0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Layer:
    """A layer of the table."""

    title: str
    geometry: MatmulGeometry | Conv2dGeometry

    @property
    def workload(self) -> Workload:
        """Without an epilogue."""
        return Workload(
            "matmul" if isinstance(self.geometry, MatmulGeometry) else "conv2d", self.geometry
        )


def _conv(batch: int, channels: int, size: int, kernel: int) -> Conv2dGeometry:
    taps, padding = (kernel, kernel), (kernel // 2,) * 4
    return Conv2dGeometry(batch, channels, size, size, channels, taps, padding=padding)


LAYERS = (
    Layer("768 -> 768, 12,800 tokens", MatmulGeometry(768, 768, 12_800)),
    Layer("768 -> 3072, 12,800 tokens", MatmulGeometry(3072, 768, 12_800)),
    Layer("3072 -> 768, 12,800 tokens", MatmulGeometry(768, 3072, 12_800)),
    Layer("conv 3x3 64@56, 32 images", _conv(32, 64, 56, 3)),
    Layer("conv 3x3 128@28, 32 images", _conv(32, 128, 28, 3)),
    Layer("conv 3x3 256@14, 32 images", _conv(32, 256, 14, 3)),
)


def estimate(layer: Layer, machine: CudaMachine, density: float) -> dict[str, Any]:
    """Estimate a layer at its best configuration."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(layer.geometry.weight_shape).astype(np.float32)
    profile = profile_weight(weight * (rng.random(weight.shape) < density))
    found = [
        (template.estimate(layer.workload, machine, profile, config), template, config)
        for template in templates_for(machine)
        if template.takes(layer.workload, machine)
        for config in template.space(layer.workload, machine)
    ]
    us, template, config = min(found, key=lambda entry: entry[0])
    events = template.events(layer.workload, machine, profile, config)
    peak = machine.multiprocessors * machine.cores * machine.gigahertz * 1e3
    return {
        "us": round(us, 1),
        "binds": cost.binds(events, machine),
        "dense_peak_us": round(layer.geometry.macs() / peak, 1),
        "kernel": template.name,
        "config": dict(config),
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Write the table: microseconds, how often the float32 peak, and what binds."""
    heads = [f"{target}, {1 - density:.0%}" for target in TARGETS for density in DENSITIES]
    lines = [f"| us (times the dense float32 peak; what binds) | {' | '.join(heads)} |"]
    lines.append(f"| --- |{' ---: |' * len(heads)}")
    for title, cases in results.items():
        cells = [
            f"{case['us']:.0f} ({case['dense_peak_us'] / case['us']:.1f}x; {case['binds']})"
            for case in cases.values()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    results = {
        layer.title: {
            f"{target} {density}": estimate(layer, _gpu(target), density)
            for target in TARGETS
            for density in DENSITIES
        }
        for layer in LAYERS
    }
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    print(table(results))
    rewrite_page(PAGE, table(results), MARKS)
    return 0


def _gpu(target: str) -> CudaMachine:
    machine = machine_of(resolve_target(target))
    assert isinstance(machine, CudaMachine)
    return machine


if __name__ == "__main__":
    sys.exit(main())
