"""Draw accuracy against speed, a panel a network, from what `accuracy.py` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

# Seen as well on white as on black.
_GREY = "#808a94"
# How a form begins -> its colour and its marker; a form is drawn as the first that fits.
_LOOKS: Mapping[str, tuple[str, str]] = {
    "dense": (_GREY, "*"),
    "unstructured": ("#e0523f", "o"),
    "2:4": ("#3d8fd1", "^"),
    "1:4": ("#3d8fd1", "v"),
    "64:2:8": ("#3d8fd1", "<"),
    "block:4x1": ("#2fa36b", "s"),
    "vector:8": ("#2fa36b", "p"),
    "block:16x1": ("#2fa36b", "D"),
    "block:1x16": ("#c28a1c", "X"),
    "tile-wise:32+5%": ("#a66bd4", "P"),
    "tile-wise:32": ("#a66bd4", "h"),
    "kernel": ("#d0609c", ">"),
    "channel": ("#d0609c", "d"),
}
_STYLE = {
    # A file that is drawn again from the same data is the same file.
    "svg.hashsalt": "tvm_sparse",
    "svg.fonttype": "none",
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _GREY
    ),
}


def draw(
    networks: Mapping[str, Sequence[Mapping[str, Any]]],
    speed: Callable[[Mapping[str, Any]], float],
    output: Path,
) -> None:
    """Write the figure; several shares of zeros of a form are joined by a line."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            1, len(networks), figsize=(10, 4.6), squeeze=False, layout="constrained"
        )
        for axis, (name, cases) in zip(axes.flat, networks.items(), strict=True):
            _draw_network(axis, cases, speed)
            axis.set_title(name)
            axis.set_xlabel("speed over the best dense library")
        axes.flat[0].set_ylabel("accuracy on distorted held-out images, %")
        legend = {}
        for axis in axes.flat:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, handle)
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center", ncols=5, frameon=False
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata={"Date": None}, transparent=True)
        plt.close(figure)


def _draw_network(
    axis: Any, cases: Sequence[Mapping[str, Any]], speed: Callable[[Mapping[str, Any]], float]
) -> None:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case["form"].partition(",")[0], []).append(case)
    for pattern, own in groups.items():
        colour, marker = next(look for start, look in _LOOKS.items() if pattern.startswith(start))
        points = [(speed(case), 100 * case["distorted"]) for case in own]
        style = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1}
        axis.plot(*zip(*points, strict=True), label=pattern, **style)
        for case, point in zip(own, points, strict=True):
            if case["zeros"]:
                text = f"{100 * case['zeros']:g}"
                axis.annotate(
                    text, point, (4, 4), textcoords="offset points", fontsize=7, color=colour
                )
    axis.grid(color=_GREY, alpha=0.25)
    axis.xaxis.set_major_formatter("{x:g}x")
