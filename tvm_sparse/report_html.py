"""A report as a page of HTML: one file with its styles and drawings inside, and no scripts."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, TypeGuard

from .report import LayerReport, Report, format_bytes, format_percent

_LARGEST = 20


def render(report: Report) -> str:
    """Return the page.

    Parameters
    ----------
    report : Report
        Of an inspection, a plan, a compilation or a profile: what it does not know is left out.

    Returns
    -------
    str
        A whole HTML document that refers to nothing outside itself.
    """
    sections = [_head(report), _notes(report), _times(report), _layers(report), _searches(report)]
    return _PAGE.format(
        title=_escape(report.source or "model"),
        style=_STYLE,
        body="\n".join(section for section in sections if section),
    )


# ---------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------


def _head(report: Report) -> str:
    facts = "\n".join(
        f"<div><dt>{_escape(name)}</dt> <dd>{_escape(value)}</dd></div>"
        for name, value in _facts(report)
    )
    return f'<h1>{_escape(report.source or "model")}</h1>\n<dl class="facts">\n{facts}\n</dl>'


def _facts(report: Report) -> list[tuple[str, str]]:
    found = report.summary()
    facts = []
    if report.target is not None:
        facts.append(("target", report.target))
    if report.threads is not None:
        facts.append(("threads", str(report.threads)))
    if "sparse" in found:
        facts.append(("sparse layers", f"{found['sparse']} of {found['layers']}"))
    else:
        facts.append(("layers", str(found["layers"])))
    if "density" in found:
        facts.append(("zeros", format_percent(1 - found["density"])))
    if "bytes_dense" in found:
        facts.append(("weights, dense", format_bytes(found["bytes_dense"])))
    if "bytes_packed" in found:
        facts.append(("weights, packed", format_bytes(found["bytes_packed"])))
    return facts + [_total(name, value) for name, value in report.totals.items()]


def _total(name: str, value: Any) -> tuple[str, str]:
    if name == "compile_seconds" and _is_time(value):
        return "compiled in", f"{value:.1f} s"
    return name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(report: Report) -> str:
    items = "\n".join(f"<li>{_escape(note)}</li>" for note in report.notes)
    return f'<ul class="notes">\n{items}\n</ul>' if items else ""


# ---------------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------------


def _times(report: Report) -> str:
    # One chart shows one kind of time: measured ones where there are any.
    kind = "measured" if any(_is_time(layer.measured_us) for layer in report.layers) else "expected"
    timed = [(layer, getattr(layer, f"{kind}_us")) for layer in report.layers]
    timed = sorted(((layer, us) for layer, us in timed if _is_time(us)), key=lambda row: -row[1])
    if not timed:
        return ""
    shown, rest = timed[:_LARGEST], timed[_LARGEST:]
    dense = [us for layer, _ in shown if (us := _if_dense(layer)) is not None]
    longest = max([us for _, us in shown] + dense) or 1.0
    bars = "\n".join(_bar(layer, us, kind, longest) for layer, us in shown)
    if rest:
        together = _microseconds(sum(us for _, us in rest))
        bars += (
            f"\n<li class='rest'>and {_count(len(rest), 'more layer')}: {together} together</li>"
        )
    return f"""\
<section>
<h2>Where the time goes</h2>
<p>{_times_summary(timed, kind)}</p>
{_times_legend(bool(dense))}
<ol class="bars">
{bars}
</ol>
</section>"""


def _times_summary(timed: Sequence[tuple[LayerReport, float]], kind: str) -> str:
    # Only what has both times can be compared.
    both = [(us, layer.dense_us) for layer, us in timed if _is_time(layer.dense_us)]
    counted = _count(len(both) or len(timed), "layer")
    if not both:
        return f"{counted} together: {_microseconds(sum(us for _, us in timed))} {kind}."
    chosen, dense = (sum(times) for times in zip(*both, strict=True))
    estimate = "" if kind == "expected" else " as planned"
    return (
        f"{counted} together: {_microseconds(chosen)} {kind}, "
        f"{_microseconds(dense)} dense{estimate}."
    )


def _times_legend(with_dense: bool) -> str:
    keys = [("sparse", "a sparse kernel"), ("plain", "a dense kernel")]
    if with_dense:
        keys.append(("outline", "the same layer if it were dense"))
    marks = (
        f'<span><svg class="key" viewBox="0 0 14 10" aria-hidden="true">'
        f'<rect class="{name}" x="1" y="1" width="12" height="8"/></svg> {text}</span>'
        for name, text in keys
    )
    return f'<p class="legend">{" ".join(marks)}</p>'


def _bar(layer: LayerReport, us: float, kind: str, longest: float) -> str:
    title = f"{layer.name}: {_microseconds(us)} {kind}"
    # A sliver at least, or the shortest would look as if they were left out.
    width = max(100 * us / longest, 0.2)
    bars = f'<rect class="{_shade(layer)}" y="2" width="{width:.2f}" height="8"/>'
    beside = ""
    dense = _if_dense(layer)
    if dense is not None:
        title += f", {_microseconds(dense)} dense"
        width = 100 * dense / longest
        bars = f'<rect class="outline" width="{width:.2f}" height="12"/>' + bars
        beside = f" <small>dense {dense:,.1f}</small>"
    # Stretched to the width that there is; what is written stays outside, where it is not.
    return (
        f"<li><span>{_name(layer.name)}</span>"
        f'<svg viewBox="0 0 100 12" preserveAspectRatio="none" role="img">'
        f"<title>{_escape(title)}</title>{bars}</svg>"
        f"<span>{_microseconds(us)}{beside}</span></li>"
    )


def _if_dense(layer: LayerReport) -> float | None:
    """Return what a sparse layer would take if it were dense."""
    return layer.dense_us if layer.is_sparse and _is_time(layer.dense_us) else None


def _shade(layer: LayerReport) -> str:
    return "sparse" if layer.is_sparse else "plain"


# ---------------------------------------------------------------------------------------------
# All layers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of the table; one that says nothing of any layer is left out."""

    title: str
    show: Callable[[LayerReport], str | None]
    kind: str = "text"


def _shown(attribute: str, show: Callable[[Any], str] = str) -> Callable[[LayerReport], str | None]:
    def cell(layer: LayerReport) -> str | None:
        value = getattr(layer, attribute)
        return None if value is None else show(value)

    return cell


def _zeros(layer: LayerReport) -> str | None:
    return None if layer.density is None else format_percent(1 - layer.density)


def _kernel(layer: LayerReport) -> str | None:
    settings = ", ".join(f"{name}={value}" for name, value in (layer.config or {}).items())
    if layer.kernel is None:
        return settings or None
    return f"{layer.kernel}: {settings}" if settings else layer.kernel


def _faster(layer: LayerReport) -> str | None:
    # Like with like: the dense time is the plan's, and so is the expected one.
    us = layer.expected_us if _is_time(layer.expected_us) else layer.measured_us
    dense = _if_dense(layer)
    return f"{dense / us:.1f}x" if dense is not None and _is_time(us) and us else None


_us = "{:,.1f}".format

_COLUMNS: tuple[_Column, ...] = (
    _Column("op", _shown("op")),
    _Column("shape", _shown("shape", lambda shape: "x".join(map(str, shape)) or "scalar")),
    _Column("dtype", _shown("dtype")),
    _Column("zeros", _zeros, "number"),
    _Column("pattern", _shown("pattern")),
    _Column("explains", _shown("explained", format_percent), "number"),
    _Column("nonzeros outside", _shown("outside", "{:,}".format), "number"),
    _Column("format", _shown("format")),
    _Column("kernel", _kernel, "long"),
    _Column("expected us", _shown("expected_us", _us), "number"),
    _Column("measured us", _shown("measured_us", _us), "number"),
    _Column("dense us", _shown("dense_us", _us), "number"),
    _Column("faster", _faster, "number"),
    _Column("dense size", _shown("bytes_dense", format_bytes), "number"),
    _Column("packed size", _shown("bytes_packed", format_bytes), "number"),
    _Column("decided by", _shown("source")),
    _Column("why", _shown("reason"), "long"),
    _Column("error share", _shown("error_share", "{:.2g}".format), "number"),
)

_EXPLAINS_MEANS = (
    "Explains: the share of the zeros that lie where the pattern wants them. Nonzeros outside "
    "stand where it has none."
)
_SHARE_MEANS = (
    "Error share: the largest difference from the dense layer in float64, over the "
    "bound that rounding alone explains; below one is good."
)


def _layers(report: Report) -> str:
    if not report.layers:
        return "<p>This model has no layers that carry weights.</p>"
    columns = [column for column in _COLUMNS if _says_something(column, report.layers)]
    titles = "".join(
        f'<th scope="col" class="{column.kind}">{column.title}</th>' for column in columns
    )
    rows = "\n".join(_row(layer, columns) for layer in report.layers)
    meanings = {
        _EXPLAINS_MEANS: any(layer.findings for layer in report.layers),
        _SHARE_MEANS: any(layer.error_share is not None for layer in report.layers),
    }
    explanations = "".join(f"<p>{text}</p>\n" for text, needed in meanings.items() if needed)
    return f"""\
<section>
<h2>All layers</h2>
<div class="scroll" role="region" aria-label="All layers" tabindex="0">
<table>
<thead><tr><th scope="col">layer</th>{titles}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{explanations}</section>"""


def _says_something(column: _Column, layers: Iterable[LayerReport]) -> bool:
    cells = {column.show(layer) for layer in layers} - {None}
    return bool(cells) and not (column.title == "dtype" and cells == {"float32"})


def _row(layer: LayerReport, columns: Iterable[_Column]) -> str:
    cells = "".join(
        f'<td class="{column.kind}">{_escape(column.show(layer) or "")}</td>' for column in columns
    )
    return f'<tr><th scope="row">{_name(layer.name)}</th>{cells}</tr>'


# ---------------------------------------------------------------------------------------------
# How tuning went
# ---------------------------------------------------------------------------------------------


def _searches(report: Report) -> str:
    # Layers that were tuned together share one history, and need one plot.
    groups: dict[tuple[tuple[int, float], ...], list[LayerReport]] = {}
    for layer in report.layers:
        points = tuple((trial, us) for trial, us in layer.history if _is_time(us) and us)
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
    first, *others = (_name(layer.name) for layer in layers)
    caption = first
    if others:
        names = "".join(f"<li>{name}</li>" for name in others)
        more = f"{first} and {len(others)} more"
        caption = f"<details><summary>{more}</summary><ul>{names}</ul></details>"
    return (
        f"<figure><figcaption>{caption}</figcaption>\n{_plot(layers[0], points)}\n"
        f"<p>{_escape(_outcome(layers[0], points))}</p></figure>"
    )


def _outcome(layer: LayerReport, points: Sequence[tuple[int, float]]) -> str:
    (_, start), (_, end) = points[0], points[-1]
    text = f"{_microseconds(end)} after {_count(len(points), 'measured trial')}"
    if start != end:
        text += f", from {_microseconds(start)}"
    if _is_time(layer.dense_us):
        text += f"; dense {_microseconds(layer.dense_us)}"
    return text


@dataclass(frozen=True)
class _Scale:
    """Where the values from `low` to `high` stand along an axis that is drawn from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


# The plot's frame within its picture; the room around it is for what is written.
_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 266, 20, 152
_LINE_HEIGHT = 13


def _plot(layer: LayerReport, points: Sequence[tuple[int, float]]) -> str:
    (first, _), (last, end) = points[0], points[-1]
    dense = layer.dense_us if _is_time(layer.dense_us) and layer.dense_us else None
    times = [us for _, us in points] + ([dense] if dense else [])
    low, high = min(times) / 1.08, max(times) * 1.08
    x = _Scale(first, max(last, first + 1), _LEFT, _RIGHT)
    logarithmic = _Scale(math.log(low), math.log(high), _BOTTOM, _TOP)

    def y(us: float) -> float:
        return logarithmic(math.log(us))

    title = f"{layer.name}: {_outcome(layer, points)}"
    parts = _axes(_log_ticks(low, high), _whole_ticks(x.low, x.high), x, y)
    label_at = y(end)
    if dense:
        dense_at, label_at = _apart(y(dense), label_at)
        parts.append(f'<path class="dense" d="M{_LEFT} {y(dense):.1f}H{_RIGHT}"/>')
        parts.append(_text(_RIGHT + 7, dense_at + 4, "dense", "start"))
    parts.append(f'<path class="line" d="{_steps(points, x, y)}"/>')
    parts.append(f'<circle class="end" cx="{x(last):.1f}" cy="{y(end):.1f}" r="3"/>')
    parts.append(_text(_RIGHT + 7, label_at + 4, f"{end:,.1f}", "start", "value"))
    drawing = "\n".join([f"<title>{_escape(title)}</title>", *parts])
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
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick:,.10g}", "end"))
    for tick in trials:
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {_BOTTOM}v4"/>')
        parts.append(_text(x(tick), _BOTTOM + 17, f"{tick:,.10g}", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>')
    parts.append(_text(_LEFT - 6, _TOP - 8, "us", "end"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 6, "trial", "middle"))
    return parts


def _apart(first: float, second: float) -> tuple[float, float]:
    """Move two labels apart that would be written over each other; the upper one stays so."""
    gap = (_LINE_HEIGHT - abs(first - second)) / 2
    if gap <= 0:
        return first, second
    return (first - gap, second + gap) if first <= second else (first + gap, second - gap)


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


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{_escape(text)}</text>"
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Choose round values: 1, 2, 5, 10 of a wide range, equal steps of a narrow one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    lead = (1,) if high / low > 1000 else (1, 2, 5)
    ticks = [digit * 10.0**decade for decade in decades for digit in lead]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 2 else _linear_ticks(low, high, _step(high - low))


def _whole_ticks(low: float, high: float) -> list[float]:
    return _linear_ticks(low, high, max(1.0, _step(high - low)))


def _linear_ticks(low: float, high: float, step: float) -> list[float]:
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _step(extent: float) -> float:
    """Choose a round step of which some four fit."""
    unit = 10.0 ** math.floor(math.log10(extent / 4))
    return next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= extent / 4 * 0.99)


# ---------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------

# What XML has no way to write; HTML has none for most of it.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _escape(text: object) -> str:
    return html.escape(_UNWRITABLE.sub("\ufffd", str(text)))


def _name(text: str) -> str:
    # Names of layers are paths, and too long for most places: they may be broken between steps.
    return re.sub("([./:])", r"\1<wbr>", _escape(text))


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and math.isfinite(value) and float(value) >= 0


def _microseconds(value: float) -> str:
    return f"{value:,.1f} us"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


# The policy: the page runs nothing and loads nothing, whatever a name may hold.
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """\
:root {
  --page: #ffffff; --raised: #f6f8fa; --ink: #1f2328; --quiet: #59636e; --rule: #d8dee4;
  --sparse: #0b7a75; --plain: #a3acb5; --dense: #8a4b08;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1419; --raised: #182028; --ink: #e6e9ec; --quiet: #9aa5b1; --rule: #2d3843;
    --sparse: #3fbdb5; --plain: #5d6873; --dense: #e0a458;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0 0 1rem; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.15rem; }
p { margin: 0 0 .75rem; color: var(--quiet); max-width: 44rem; }
small { font-size: .85em; color: var(--quiet); }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: .5rem; margin: 0;
}
.facts div { padding: .5rem .75rem; background: var(--raised); border-radius: 6px; }
.facts dt { font-size: .8rem; color: var(--quiet); }
.facts dd {
  margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.notes {
  margin: 1rem 0 0; padding: .5rem .75rem .5rem 2rem; overflow-wrap: anywhere;
  border-left: 3px solid var(--dense); background: var(--raised);
}
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .85rem; }
.key { width: 14px; height: 10px; }
rect.sparse { fill: var(--sparse); }
rect.plain { fill: var(--plain); }
rect.outline {
  fill: none; stroke: var(--quiet); stroke-width: 1; vector-effect: non-scaling-stroke;
}
.bars { list-style: none; margin: 0; padding: 0; }
.bars li {
  display: grid; grid-template-columns: minmax(0, 16rem) minmax(0, 1fr) 11rem;
  gap: 0 .75rem; align-items: center; padding: .2rem 0; font-size: .9rem;
  font-variant-numeric: tabular-nums;
}
.bars li > span { overflow-wrap: anywhere; }
.bars .rest { display: block; color: var(--quiet); }
.bars svg { display: block; width: 100%; height: 14px; overflow: visible; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid var(--sparse); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; line-height: 1.4; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; white-space: nowrap; }
tbody tr > * { border-top: 1px solid var(--rule); }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child {
  position: sticky; left: 0; min-width: 13rem; max-width: 18rem; background: var(--page);
  font-weight: 600; white-space: normal; overflow-wrap: anywhere;
}
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.long { min-width: 14rem; max-width: 24rem; white-space: normal; overflow-wrap: anywhere; }
.scroll + p { margin-top: .5rem; font-size: .85rem; }
.plots {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 1rem; align-items: start;
}
figure { margin: 0; padding: .75rem; border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-size: .85rem; font-weight: 600; overflow-wrap: anywhere; }
figcaption ul { margin: .25rem 0; padding-left: 1.5rem; font-weight: 400; }
summary { cursor: pointer; }
figure svg { display: block; width: 100%; max-width: 26rem; height: auto; margin: .5rem 0 .25rem; }
figure p { margin: 0; font-size: .85rem; }
text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.label { fill: var(--quiet); }
.value { fill: var(--ink); font-weight: 600; }
.grid, .axis, .dense, .line { fill: none; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--quiet); }
.dense { stroke: var(--dense); stroke-width: 1.5; stroke-dasharray: 5 4; }
.line { stroke: var(--sparse); stroke-width: 2; stroke-linejoin: round; }
.end { fill: var(--sparse); }
@media (max-width: 40rem) {
  .bars li { grid-template-columns: minmax(0, 1fr) auto; padding: .35rem 0; }
  .bars svg { grid-column: 1 / -1; order: 1; }
  th:first-child { min-width: 7rem; max-width: 9rem; }
}
@media print {
  .scroll { overflow: visible; }
}
"""
