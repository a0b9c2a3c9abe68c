"""The roofline: how near each layer comes to what the machine can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Ceilings, LayerReport, Report
from .drawing import Frame, LogScale, label, log_ticks
from .table import gflops
from .text import escape, is_time
from .times import shade

_FRAME = Frame(width=560, height=340, left=76, right=540, top=40, bottom=286, gap=8)


@dataclass(frozen=True)
class _Point:
    layer: LayerReport
    intensity: float
    gflops: float


def roofline(report: Report) -> str:
    """Draw the plot; nothing where the machine or the layers' work are not known."""
    top = report.ceilings
    points = [point for layer in report.layers if (point := _point(layer)) is not None]
    if top is None or not points or not _is_rate(top.gflops) or not _is_rate(top.memory_gbytes):
        return ""
    measured = any(is_time(layer.measured_us) for layer in report.layers)
    return f"""\
<section>
<h2>Roofline</h2>
<p>A point is a layer: how many operations it has for each byte that it touches, and how many it
gets done a second; only those with nonzeros count. Times are {
        "measured" if measured else "expected"
    }. The roof is what the machine can do at most by the cost model's prices:
{top.gflops:,.0f} GFLOP/s of multiply-adds, {top.memory_gbytes:,.0f} GB/s from memory. What caches
hold may stand above the slope.</p>
<figure class="wide">
{_plot(points, top)}
<p class="legend"><span><i class="dot sparse"></i> a sparse kernel</span>
<span><i class="dot plain"></i> a dense kernel</span></p>
</figure>
</section>"""


def _is_rate(value: float) -> bool:
    return is_time(value) and value > 0


def _point(layer: LayerReport) -> _Point | None:
    rate, moved = gflops(layer), layer.bytes_moved
    if rate is None or not _is_rate(rate) or moved is None or not _is_rate(moved):
        return None
    assert layer.operations is not None
    return _Point(layer, layer.operations / moved, rate)


def _plot(points: Sequence[_Point], top: Ceilings) -> str:
    ridge = top.gflops / top.memory_gbytes
    roofs = [top.gflops] + [top.tensor_gflops] * bool(top.tensor_gflops)
    x = _scale([ridge, *(p.intensity for p in points)], _FRAME.left, _FRAME.right)
    y = _scale([*(p.gflops for p in points), *(r for r in roofs if r)], _FRAME.bottom, _FRAME.top)
    parts = [
        *_FRAME.rows(log_ticks(y.low, y.high), y, "GFLOP/s"),
        *_FRAME.columns(_sparse_ticks(log_ticks(x.low, x.high)), x, "operations a byte"),
        *_roof(x, y, top.gflops, top.memory_gbytes, "multiply-adds"),
    ]
    if top.tensor_gflops:
        parts += _roof(x, y, top.tensor_gflops, top.memory_gbytes, "tensor cores")
    for point in points:
        title = (
            f"{point.layer.name}: {point.gflops:,.1f} GFLOP/s, "
            f"{point.intensity:,.2f} operations a byte"
        )
        parts.append(
            f'<circle class="{shade(point.layer)}" cx="{x(point.intensity):.1f}" '
            f'cy="{y(point.gflops):.1f}" r="4.5"><title>{escape(title)}</title></circle>'
        )
    title = f"Roofline of {len(points)} layers below {top.gflops:,.0f} GFLOP/s"
    return _FRAME.picture(title, parts)


def _scale(values: Sequence[float], start: float, end: float) -> LogScale:
    """Cover the values, with some room around them."""
    return LogScale(min(values) / 2, max(values) * 2, start, end)


def _sparse_ticks(ticks: list[float]) -> list[float]:
    """Leave out ticks that there is no room to write."""
    return ticks[:: math.ceil(len(ticks) / 9)]


def _roof(x: LogScale, y: LogScale, gflops: float, gbytes: float, name: str) -> list[str]:
    """Draw the slope up to the ridge, and the flat part behind it."""
    start = max(x.low, y.low / gbytes)
    ridge = min(gflops / gbytes, x.high)
    begin, bend = (x(start), y(start * gbytes)), (x(ridge), y(ridge * gbytes))
    path = f"M{begin[0]:.1f} {begin[1]:.1f}L{bend[0]:.1f} {bend[1]:.1f}H{_FRAME.right}"
    return [
        f'<path class="roof" d="{path}"/>',
        label(_FRAME.right - 4, bend[1] - 6, name, "end", "value"),
    ]
