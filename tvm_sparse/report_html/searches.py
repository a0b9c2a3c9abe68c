"""How tuning went: the fastest kernel so far, trial by trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ..report import LayerReport, Report
from .drawing import Frame, LogScale, Scale, apart, label, log_ticks, whole_ticks
from .text import breakable, count, escape, is_time, microseconds


def searches(report: Report) -> str:
    """Draw a plot for each search; nothing where nothing was tuned."""
    # Layers that were tuned together share one history, and need one plot.
    groups: dict[tuple[tuple[int, float], ...], list[LayerReport]] = {}
    for layer in report.layers:
        points = tuple((trial, us) for trial, us in layer.history if is_time(us) and us)
        if points:
            groups.setdefault(points, []).append(layer)
    if not groups:
        return ""
    figures = "\n".join(_figure(layers, points) for points, layers in groups.items())
    return f"""\
<section>
<h2>How tuning went</h2>
<p>The fastest kernel so far, trial by trial; times are on a logarithmic scale.</p>
<div class="plots">
{figures}
</div>
</section>"""


def _figure(layers: Sequence[LayerReport], points: Sequence[tuple[int, float]]) -> str:
    first, *others = (breakable(layer.name) for layer in layers)
    caption = first
    if others:
        names = "".join(f"<li>{name}</li>" for name in others)
        more = f"{first} and {len(others)} more"
        caption = f"<details><summary>{more}</summary><ul>{names}</ul></details>"
    return (
        f"<figure><figcaption>{caption}</figcaption>\n{_plot(layers[0], points)}\n"
        f"<p>{escape(_outcome(layers[0], points))}</p></figure>"
    )


def _outcome(layer: LayerReport, points: Sequence[tuple[int, float]]) -> str:
    (_, start), (_, end) = points[0], points[-1]
    text = f"{microseconds(end)} after {count(len(points), 'measured trial')}"
    if start != end:
        text += f", from {microseconds(start)}"
    if is_time(layer.dense_us):
        text += f"; dense {microseconds(layer.dense_us)}"
    return text


_FRAME = Frame(width=320, height=190, left=46, right=266, top=20, bottom=152)


def _plot(layer: LayerReport, points: Sequence[tuple[int, float]]) -> str:
    (first, _), (last, end) = points[0], points[-1]
    dense = layer.dense_us if is_time(layer.dense_us) and layer.dense_us else None
    times = [us for _, us in points] + ([dense] if dense else [])
    low, high = min(times) / 1.08, max(times) * 1.08
    x = Scale(first, max(last, first + 1), _FRAME.left, _FRAME.right)
    y = LogScale(low, high, _FRAME.bottom, _FRAME.top)
    title = f"{layer.name}: {_outcome(layer, points)}"
    parts = [
        *_FRAME.rows(log_ticks(low, high), y, "us"),
        *_FRAME.columns(whole_ticks(x.low, x.high), x, "trial"),
    ]
    end_at = y(end)
    if dense:
        dense_at, end_at = apart(y(dense), end_at)
        parts.append(f'<path class="dense" d="M{_FRAME.left} {y(dense):.1f}H{_FRAME.right}"/>')
        parts.append(label(_FRAME.right + 7, dense_at + 4, "dense", "start"))
    parts.append(f'<path class="line" d="{_steps(points, x, y)}"/>')
    parts.append(f'<circle class="end" cx="{x(last):.1f}" cy="{y(end):.1f}" r="3"/>')
    parts.append(label(_FRAME.right + 7, end_at + 4, f"{end:,.1f}", "start", "value"))
    return _FRAME.picture(title, parts)


def _steps(
    points: Sequence[tuple[int, float]], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    """Draw the line from improvement to improvement; the trials between are on it anyway."""
    trial, us = points[0]
    path = f"M{x(trial):.1f} {y(us):.1f}"
    for (_, before), (trial, us) in pairwise(points):
        if us != before:
            path += f"H{x(trial):.1f}V{y(us):.1f}"
    return f"{path}H{x(points[-1][0]):.1f}"
