"""The head of the page: what was compiled for what, its figures, and the notes."""

from __future__ import annotations

from typing import Any

from ..report import Report, format_bytes, format_percent
from .text import escape, is_time, short_time
from .times import Compared


def head(report: Report) -> str:
    """Write the title, the figures and the notes."""
    facts = "\n".join(
        f"<div><dt>{escape(name)}</dt> <dd>{escape(value)}</dd></div>"
        for name, value in _facts(report)
    )
    title = escape(report.source or "model")
    return f'<h1>{title}</h1>\n<dl class="facts">\n{facts}\n</dl>\n{_notes(report)}'


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
    compared = Compared.of(report)
    if compared.ratio is not None:
        facts.append(("before, dense", short_time(compared.dense)))
        facts.append((f"after, {compared.kind}", short_time(compared.chosen)))
        facts.append(("faster", f"{compared.ratio:.1f}x"))
    if "bytes_dense" in found:
        facts.append(("weights, dense", format_bytes(found["bytes_dense"])))
    if "bytes_packed" in found:
        facts.append(("weights, packed", format_bytes(found["bytes_packed"])))
    return facts + [_total(name, value) for name, value in report.totals.items()]


def _total(name: str, value: Any) -> tuple[str, str]:
    if name == "compile_seconds" and is_time(value):
        return "compiled in", f"{value:.1f} s"
    return name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)


def _notes(report: Report) -> str:
    items = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<ul class="notes">\n{items}\n</ul>' if items else ""
