"""The table of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..report import LayerReport, Report, format_bytes, format_percent
from .text import breakable, escape, is_time, shape
from .times import if_dense


@dataclass(frozen=True)
class _Column:
    """A column: what it says of a layer, and how; one that says nothing of any is left out."""

    title: str
    value: Callable[[LayerReport], Any]
    show: Callable[[Any], str] = str
    kind: str = "text"


def _of(attribute: str) -> Callable[[LayerReport], Any]:
    return lambda layer: getattr(layer, attribute)


def _zeros(layer: LayerReport) -> float | None:
    return None if layer.density is None else 1 - layer.density


def _faster(layer: LayerReport) -> float | None:
    # Like with like: the dense time is the plan's, and so is the expected one.
    us = layer.expected_us if is_time(layer.expected_us) else layer.measured_us
    dense = if_dense(layer)
    return dense / us if dense is not None and is_time(us) and us else None


def time_of(layer: LayerReport) -> float | None:
    """Return a layer's time, measured if it was; None where it is not known, or nothing."""
    us = layer.measured_us if is_time(layer.measured_us) else layer.expected_us
    return us if is_time(us) and us else None


def gflops(layer: LayerReport) -> float | None:
    """Return operations with nonzeros, in 1e9 a second."""
    us = time_of(layer)
    if us is None or not is_time(layer.operations):
        return None
    return layer.operations / us * 1e-3


_us = "{:,.1f}".format

_COLUMNS: tuple[_Column, ...] = (
    _Column("op", _of("op")),
    _Column("shape", _of("shape"), shape),
    _Column("dtype", _of("dtype")),
    _Column("zeros", _zeros, format_percent, "number"),
    _Column("pattern", _of("pattern")),
    _Column("explains", _of("explained"), format_percent, "number"),
    _Column("nonzeros outside", _of("outside"), "{:,}".format, "number"),
    _Column("format", _of("format")),
    _Column("kernel", _of("kernel")),
    _Column("dense us", _of("dense_us"), _us, "number"),
    _Column("expected us", _of("expected_us"), _us, "number"),
    _Column("measured us", _of("measured_us"), _us, "number"),
    _Column("faster", _faster, "{:.1f}x".format, "number"),
    _Column("why", _of("reason"), kind="long"),
    _Column("decided by", _of("source")),
    _Column("dense size", _of("bytes_dense"), format_bytes, "number"),
    _Column("packed size", _of("bytes_packed"), format_bytes, "number"),
    _Column("bound by", _of("bound_by")),
    _Column("GFLOP/s", gflops, "{:,.1f}".format, "number"),
    _Column("error share", _of("error_share"), "{:.2g}".format, "number"),
)

_MEANINGS: dict[str, str] = {
    "explains": "Explains: the share of the zeros that lie where the pattern wants them. Nonzeros "
    "outside stand where it has none.",
    "bound by": "Bound by: what takes the kernel the longest, by the cost model.",
    "GFLOP/s": "GFLOP/s: only multiplications and additions with nonzeros count.",
    "error share": "Error share: the largest difference from the dense layer in float64, over the "
    "bound that rounding alone explains; below one is good.",
}


def table(report: Report) -> str:
    """Write the table, and what its columns mean."""
    if not report.layers:
        return "<p>This model has no layers that carry weights.</p>"
    columns = [column for column in _COLUMNS if _says_something(column, report.layers)]
    titles = "".join(
        f'<th scope="col" class="{column.kind}">{column.title}</th>' for column in columns
    )
    rows = "\n".join(_row(number, layer, columns) for number, layer in enumerate(report.layers))
    shown = {column.title for column in columns}
    meanings = "".join(
        f'<p class="small">{text}</p>\n' for title, text in _MEANINGS.items() if title in shown
    )
    return f"""\
<section>
<h2>All layers</h2>
<div class="tools" hidden>
<label>Search <input id="search" type="search" autocomplete="off"></label>
<span id="found" role="status"></span>
</div>
<div class="scroll" role="region" aria-label="All layers" tabindex="0">
<table id="layers">
<thead><tr><th scope="col">layer</th>{titles}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{meanings}</section>"""


def _says_something(column: _Column, layers: Iterable[LayerReport]) -> bool:
    values = {column.value(layer) for layer in layers} - {None}
    return bool(values) and not (column.title == "dtype" and values == {"float32"})


def _row(number: int, layer: LayerReport, columns: Sequence[_Column]) -> str:
    cells = "".join(_cell(column, column.value(layer)) for column in columns)
    name = f'<a href="#weight-{number}">{breakable(layer.name)}</a>'
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _cell(column: _Column, value: Any) -> str:
    if value is None:
        return f'<td class="{column.kind}"></td>'
    # What is written is rounded and has units: the script sorts by the number.
    sort = f' data-sort="{escape(value)}"' if column.kind == "number" else ""
    return f'<td class="{column.kind}"{sort}>{escape(column.show(value))}</td>'
