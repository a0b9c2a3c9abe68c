"""How tuning went: the fastest kernel so far, trial by trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ..report import LayerReport, Report
from .drawing import LogScale, Scale, apart, label, log_ticks, whole_ticks
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


# The plot's frame within its picture; the room around it is for what is written.
_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 266, 20, 152


def _plot(layer: LayerReport, points: Sequence[tuple[int, float]]) -> str:
    (first, _), (last, end) = points[0], points[-1]
    dense = layer.dense_us if is_time(layer.dense_us) and layer.dense_us else None
    times = [us for _, us in points] + ([dense] if dense else [])
    low, high = min(times) / 1.08, max(times) * 1.08
    x = Scale(first, max(last, first + 1), _LEFT, _RIGHT)
    y = LogScale(low, high, _BOTTOM, _TOP)

    title = f"{layer.name}: {_outcome(layer, points)}"
    parts = _axes(log_ticks(low, high), whole_ticks(x.low, x.high), x, y)
    end_at = y(end)
    if dense:
        dense_at, end_at = apart(y(dense), end_at)
        parts.append(f'<path class="dense" d="M{_LEFT} {y(dense):.1f}H{_RIGHT}"/>')
        parts.append(label(_RIGHT + 7, dense_at + 4, "dense", "start"))
    parts.append(f'<path class="line" d="{_steps(points, x, y)}"/>')
    parts.append(f'<circle class="end" cx="{x(last):.1f}" cy="{y(end):.1f}" r="3"/>')
    parts.append(label(_RIGHT + 7, end_at + 4, f"{end:,.1f}", "start", "value"))
    drawing = "\n".join([f"<title>{escape(title)}</title>", *parts])
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n{drawing}\n</svg>'


def _axes(
    times: Sequence[float],
    trials: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[str]:
    parts = []
    for tick in times:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_RIGHT}"/>')
        parts.append(label(_LEFT - 6, y(tick) + 4, f"{tick:,.10g}", "end"))
    for tick in trials:
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {_BOTTOM}v4"/>')
        parts.append(label(x(tick), _BOTTOM + 17, f"{tick:,.10g}", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>')
    parts.append(label(_LEFT - 6, _TOP - 8, "us", "end"))
    parts.append(label((_LEFT + _RIGHT) / 2, _HEIGHT - 6, "trial", "middle"))
    return parts


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
