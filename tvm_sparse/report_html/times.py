"""Where the time goes: the whole network before and after, and its slowest layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report import LayerReport, Report
from .text import breakable, count, escape, is_time, microseconds, short_time

_LARGEST = 20


@dataclass(frozen=True)
class Compared:
    """The layers' times, as chosen and as dense.

    Attributes
    ----------
    kind : str
        "measured" where there are measured times, else "expected".
    timed : tuple of (LayerReport, float)
        The layers with such a time, in the model's order.
    both : tuple of (LayerReport, float)
        Those of them whose dense time is known, too: only they can be compared.
    """

    kind: str
    timed: tuple[tuple[LayerReport, float], ...]
    both: tuple[tuple[LayerReport, float], ...]

    @classmethod
    def of(cls, report: Report) -> Compared:
        """Collect the times of a report: one kind for all."""
        measured = any(is_time(layer.measured_us) for layer in report.layers)
        kind = "measured" if measured else "expected"
        times = ((layer, getattr(layer, f"{kind}_us")) for layer in report.layers)
        timed = tuple((layer, us) for layer, us in times if is_time(us))
        return cls(kind, timed, tuple(row for row in timed if is_time(row[0].dense_us)))

    @property
    def chosen(self) -> float:
        """Microseconds of the layers that can be compared, as chosen."""
        return sum(us for _, us in self.both)

    @property
    def dense(self) -> float:
        """Microseconds of the same layers, dense."""
        return sum(layer.dense_us or 0.0 for layer, _ in self.both)

    @property
    def ratio(self) -> float | None:
        """How many times faster they are; None where that is not known."""
        return self.dense / self.chosen if self.chosen and self.dense else None


def times(report: Report) -> str:
    """Draw the bars; nothing where no times are known."""
    found = Compared.of(report)
    if not found.timed:
        return ""
    timed = sorted(found.timed, key=lambda row: -row[1])
    shown, rest = timed[:_LARGEST], timed[_LARGEST:]
    dense = [us for layer, _ in shown if (us := if_dense(layer)) is not None]
    longest = max([us for _, us in shown] + dense) or 1.0
    bars = "\n".join(_bar(layer, us, found.kind, longest) for layer, us in shown)
    if rest:
        together = microseconds(sum(us for _, us in rest))
        bars += f"\n<li class='rest'>and {count(len(rest), 'more layer')}: {together} together</li>"
    return f"""\
<section>
<h2>Where the time goes</h2>
<p>{_summary(found)}</p>
{_whole(found)}
{_legend(bool(dense))}
<ol class="bars">
{bars}
</ol>
</section>"""


def if_dense(layer: LayerReport) -> float | None:
    """Return what a sparse layer would take if it were dense."""
    return layer.dense_us if layer.is_sparse and is_time(layer.dense_us) else None


def _summary(found: Compared) -> str:
    counted = count(len(found.both) or len(found.timed), "layer")
    if not found.both:
        together = microseconds(sum(us for _, us in found.timed))
        return f"{counted} together: {together} {found.kind}."
    estimate = "" if found.kind == "expected" else " as planned"
    return (
        f"{counted} together: {microseconds(found.chosen)} {found.kind}, "
        f"{microseconds(found.dense)} dense{estimate}."
    )


def _whole(found: Compared) -> str:
    """Draw all layers in a row, before and after, a segment each."""
    if found.ratio is None:
        return ""
    longest = max(found.chosen, found.dense)
    before = [(layer, layer.dense_us or 0.0, "plain") for layer, _ in found.both]
    after = [(layer, us, shade(layer)) for layer, us in found.both]
    return (
        '<ol class="bars whole">\n'
        + _row("before: all dense", before, longest)
        + _row(f"after: {found.kind}", after, longest)
        + "</ol>"
    )


def _row(name: str, segments: Sequence[tuple[LayerReport, float, str]], longest: float) -> str:
    total = sum(us for _, us, _ in segments)
    parts, at = [], 0.0
    for layer, us, kind in segments:
        width = 100 * us / longest
        title = escape(f"{layer.name}: {microseconds(us)}")
        # A gap shows where one ends, as far as there is room for it.
        drawn = max(0.0, width - min(0.15, width / 4))
        parts.append(
            f'<rect class="{kind}" x="{at:.2f}" width="{drawn:.2f}" height="12">'
            f"<title>{title}</title></rect>"
        )
        at += width
    alt = escape(f"{name}, {count(len(segments), 'layer')}: {short_time(total)}")
    return (
        f"<li><span>{escape(name)}</span>"
        f'<svg viewBox="0 0 100 12" preserveAspectRatio="none" role="img">'
        f"<title>{alt}</title>{''.join(parts)}</svg>"
        f"<span>{short_time(total)}</span></li>\n"
    )


def _legend(with_dense: bool) -> str:
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
    title = f"{layer.name}: {microseconds(us)} {kind}"
    # A sliver at least, or the shortest would look as if they were left out.
    width = max(100 * us / longest, 0.2)
    bars = f'<rect class="{shade(layer)}" y="2" width="{width:.2f}" height="8"/>'
    beside = ""
    dense = if_dense(layer)
    if dense is not None:
        title += f", {microseconds(dense)} dense"
        width = 100 * dense / longest
        bars = f'<rect class="outline" width="{width:.2f}" height="12"/>' + bars
        beside = f" <small>dense {dense:,.1f}</small>"
    # Stretched to the width that there is; what is written stays outside, where it is not.
    return (
        f"<li><span>{breakable(layer.name)}</span>"
        f'<svg viewBox="0 0 100 12" preserveAspectRatio="none" role="img">'
        f"<title>{escape(title)}</title>{bars}</svg>"
        f"<span>{microseconds(us)}{beside}</span></li>"
    )


def shade(layer: LayerReport) -> str:
    """Name the class of what is drawn of a layer."""
    return "sparse" if layer.is_sparse else "plain"
