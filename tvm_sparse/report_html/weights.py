"""Weight by weight: where its zeros are, what was considered for it, and why that was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..report import LayerReport, Report, Tried, format_bytes, format_percent
from ..spy import Spy
from .png import data_uri
from .table import time_of
from .text import breakable, escape, is_time, microseconds, settings, shape
from .times import if_dense

# Small pictures are enlarged by whole pixels up to this.
_LARGE = 480


def weights(report: Report) -> str:
    """Write a part for each layer; the one that takes longest is open."""
    if not report.layers:
        return ""
    longest = max(report.layers, key=lambda layer: time_of(layer) or 0.0)
    parts = "\n".join(
        _weight(number, layer, layer is longest) for number, layer in enumerate(report.layers)
    )
    pictures = any(layer.spy for layer in report.layers)
    return f"""\
<section>
<h2>Weight by weight</h2>
{_PICTURES_MEAN if pictures else ""}
<div class="tools" hidden>
<label>Weight <select id="weight"></select></label>
</div>
<div id="weights">
{parts}
</div>
</section>"""


_PICTURES_MEAN = (
    "<p>A picture shows a weight's nonzeros, output features downwards: the denser a cell, the "
    "stronger its colour. In packed order, rows stand as the kernel takes them, and columns that a "
    "panel of rows does not need are left out of their block.</p>"
)


def _weight(number: int, layer: LayerReport, is_open: bool) -> str:
    return f"""\
<details class="weight" id="weight-{number}"{" open" if is_open else ""}>
<summary><h3>{breakable(layer.name)}</h3> <small>{escape(_in_short(layer))}</small></summary>
{_why(layer)}
{_pictures(layer)}
{_candidates(layer)}
</details>"""


def _in_short(layer: LayerReport) -> str:
    parts = [shape(layer.shape)]
    if layer.density is not None:
        parts.append(f"{format_percent(1 - layer.density)} zeros")
    if layer.format is not None:
        parts.append(layer.format)
    us = time_of(layer)
    if us is not None:
        parts.append(microseconds(us))
    return ", ".join(parts)


def _why(layer: LayerReport) -> str:
    return "".join(f"<p>{escape(sentence)}</p>\n" for sentence in _sentences(layer))


def _sentences(layer: LayerReport) -> Iterator[str]:
    if layer.reason:
        by = f" (decided by: {layer.source})" if layer.source else ""
        yield f"{layer.format or 'not planned'}: {layer.reason}{by}."
    us, dense = time_of(layer), if_dense(layer)
    if us is not None and dense is not None:
        yield f"Before {microseconds(dense)}, after {microseconds(us)}: {dense / us:.1f}x."
    if layer.kernel is not None or layer.config:
        yield f"Kernel {_kernel(layer.kernel or '', layer.config or {})}."
    if layer.bound_by:
        yield f"Bound by {layer.bound_by}."
    if layer.bytes_dense is not None and layer.bytes_packed is not None:
        before, after = format_bytes(layer.bytes_dense), format_bytes(layer.bytes_packed)
        yield f"{before} dense, {after} packed."


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def _pictures(layer: LayerReport) -> str:
    figures = []
    if layer.spy is not None:
        figures.append(_figure(layer, layer.spy, "original order"))
    if layer.packed_spy is not None:
        with_others = f", with {', '.join(layer.packed_with)}" if layer.packed_with else ""
        caption = f"packed order of {layer.format}{with_others}"
        figures.append(_figure(layer, layer.packed_spy, caption))
    elif layer.spy is not None and layer.format is not None:
        figures.append("<p>Rows and columns stay in their places when it is packed.</p>")
    return f'<div class="pictures">\n{"".join(figures)}</div>' if figures else ""


def _figure(layer: LayerReport, picture: Spy, caption: str) -> str:
    scale = max(1, _LARGE // max(picture.height, picture.width))
    densest = f"the densest cell is {format_percent(picture.densest)} nonzero"
    alt = escape(f"Nonzeros of {layer.name}, {caption}; {densest}.")
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>\n"
        f'<img alt="{alt}" src="{data_uri(picture)}" '
        f'width="{scale * picture.width}" height="{scale * picture.height}">\n'
        f"<p>{picture.height} x {picture.width} cells; {densest}</p></figure>\n"
    )


# ---------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------


def _candidates(layer: LayerReport) -> str:
    if not layer.candidates and not layer.refusals:
        return ""
    rows = [_tried(layer, tried) for tried in layer.candidates]
    rows += [
        f'<tr class="refused"><th scope="row">{escape(name)}</th>'
        f'<td colspan="4">refused: {escape(reason)}</td></tr>'
        for name, reason in layer.refusals.items()
    ]
    label = escape(f"Candidates for {layer.name}")
    return f"""\
<div class="scroll" role="region" aria-label="{label}" tabindex="0">
<table>
<caption>Candidates</caption>
<thead><tr><th scope="col">format</th><th scope="col">kernel</th>
<th scope="col" class="number">us</th><th scope="col">time</th>
<th scope="col">beside the chosen</th></tr></thead>
<tbody>
{"".join(rows)}
</tbody>
</table>
</div>"""


def _tried(layer: LayerReport, tried: Tried) -> str:
    chosen = tried.kernel == layer.kernel
    kernel = _kernel(tried.kernel, tried.config)
    us = f"{tried.us:,.1f}" if is_time(tried.us) else ""
    return (
        f'<tr class="{"chosen" if chosen else "tried"}"><th scope="row">{escape(tried.format)}</th>'
        f'<td class="long">{escape(kernel)}</td><td class="number">{us}</td>'
        f"<td>{'measured' if tried.measured else 'expected'}</td>"
        f"<td>{'chosen' if chosen else _against(tried.us, _chosen_us(layer))}</td></tr>\n"
    )


def _kernel(name: str, config: Mapping[str, Any]) -> str:
    return f"{name}: {settings(config)}" if config else name


def _chosen_us(layer: LayerReport) -> float | None:
    """Return the time that others are held against: of a kind with theirs."""
    if layer.expected_us is not None:
        return layer.expected_us
    return next((tried.us for tried in layer.candidates if tried.kernel == layer.kernel), None)


def _against(us: float, chosen: float | None) -> str:
    if not is_time(us) or not is_time(chosen) or not us or not chosen:
        return ""
    return f"{us / chosen:.2f}x slower" if us >= chosen else f"{chosen / us:.2f}x faster"
