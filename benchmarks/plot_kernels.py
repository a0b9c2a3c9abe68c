"""Draw the speed over the best dense float32 peer by density, from the JSON of `kernels.py`.

python benchmarks/plot_kernels.py [--json FILE] [--output FILE.svg] [--shapes 768x768x128,...]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from results import Store
from summary import Row, rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"
IMAGE = ROOT / "docs" / "images" / "kernels.svg"
SECTIONS = ("matmul", "few", "conv")
# One panel each, where they were measured: BERT's layers, few tokens, one convolution of a kind.
PANELS = (
    "768x768x128",
    "3072x768x128",
    "768x3072x128",
    "768x768x32",
    "768x768x16",
    "768x768x1",
    "1x1 256->1024@14",
    "1x1 512->512@14",
    "3x3 64->64@56",
    "3x3 128->128@28",
    "3x3 256->256@14",
    "3x3/2 256->256@28",
)
# System -> what the legend says, the colour, the width of its line.
LINES: dict[str, tuple[str, str, float]] = {
    "plan": ("tvm_sparse (as planned)", "#c0392b", 2.2),
    "plan alone": ("tvm_sparse, kernel alone", "#e59866", 1.4),
    "bar": ("hand-written C++", "#2c3e50", 1.2),
    "mkl csr": ("MKL, CSR", "#2471a3", 1.2),
    "scipy csr": ("SciPy, CSR", "#85c1e9", 1.2),
    "openvino default": ("OpenVINO, default precision", "#7d8c2a", 1.2),
}
_ACROSS = 3
# A file that is drawn again from the same data is the same file.
STYLE = {"svg.hashsalt": "tvm_sparse", "svg.fonttype": "none", "font.size": 9}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=IMAGE)
    parser.add_argument("--shapes", help="comma-separated names of cases, one panel each")
    options = parser.parse_args()
    sections = Store(options.json).read()
    found = [row for name in SECTIONS if name in sections for row in rows(name, sections[name])]
    wanted = options.shapes.split(",") if options.shapes else list(PANELS)
    panels = by_case(found, wanted)
    if not panels:
        parser.error(f"'{options.json}' holds none of the cases {', '.join(wanted)}")
    environment = next(sections[name]["environment"] for name in SECTIONS if name in sections)
    draw(panels, environment, options.output)
    print(f"{options.output}: {len(panels)} panels")


def by_case(found: list[Row], wanted: list[str]) -> dict[str, list[Row]]:
    """Gather the rows of the wanted cases that were measured, in the order wanted."""
    panels = {name: [row for row in found if row.name == name] for name in wanted}
    return {
        name: sorted(own, key=lambda row: row.density, reverse=True)
        for name, own in panels.items()
        if own
    }


def draw(panels: dict[str, list[Row]], environment: dict[str, Any], output: Path) -> None:
    """Write the figure."""
    plt.rcParams.update(STYLE)
    down = math.ceil(len(panels) / _ACROSS)
    figure, axes = plt.subplots(
        down, _ACROSS, figsize=(10, 0.9 + 2.6 * down), squeeze=False, layout="constrained"
    )
    spots = list(axes.flat)
    for axis, (name, own) in zip(spots, panels.items(), strict=False):
        _draw_panel(axis, name, own)
    for axis in spots[len(panels) :]:
        axis.set_axis_off()
    legend = {}
    for axis in spots[: len(panels)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(
        f"Speed over the better of ONNX Runtime and OpenVINO in float32, one thread, "
        f"{environment['cpu']}, {environment['date'][:10]}",
        fontsize=10,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def _draw_panel(axis: Any, name: str, own: list[Row]) -> None:
    axis.axhline(1, color="#888888", linewidth=0.8, linestyle="--")
    for system, (label, colour, width) in LINES.items():
        points = [(row.density, row.over_dense(system)) for row in own]
        points = [(density, speed) for density, speed in points if speed]
        if points:
            style = {"color": colour, "linewidth": width, "marker": "o", "markersize": 3}
            axis.plot(*zip(*points, strict=True), label=label, **style)
    densities = [row.density for row in own]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.invert_xaxis()
    axis.set_xticks(densities, [f"{density:g}" for density in densities])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= t <= high]
    axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.grid(color="#eeeeee")
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("density")


if __name__ == "__main__":
    main()
