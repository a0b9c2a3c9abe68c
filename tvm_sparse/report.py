"""What was found in a model and what became of it: a table, a page of HTML, and JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .errors import SparseError
from .files import write_text
from .findings import Finding
from .plain_data import build, parse_json
from .spy import Spy

VERSION = 1
_GAP = "  "
_NARROWEST = 12
_NARROWEST_NAME = 28
_NAMES_IN_A_REASON = 6


@dataclass(frozen=True)
class Tried:
    """A kernel that was considered for a layer, at its best configuration.

    `us` is its time in microseconds, as it was measured or as the cost model expects it.
    """

    format: str
    kernel: str
    config: Mapping[str, Any]
    us: float
    measured: bool = False


@dataclass(frozen=True)
class Ceilings:
    """How fast a machine is at most, by the cost model's prices.

    Attributes
    ----------
    gflops : float
        Multiply-adds in float32 on all threads, counted as two, in 1e9 a second.
    memory_gbytes : float
        Reading memory, in 1e9 bytes a second.
    tensor_gflops : float or None
        The same of a GPU's tensor cores.
    """

    gflops: float
    memory_gbytes: float
    tensor_gflops: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer that carries a weight. What is not known (yet) is None.

    Attributes
    ----------
    name, op : str
        The user's name of the layer, and its operator.
    shape : tuple of int
        The weight as the model holds it.
    density, pattern, nnz
        From the weight's `SparsityProfile`.
    format : str or None
        "dense", or the sparse format that the weight was packed in; None when nothing was planned.
    kernel, config
        The kernel template, and the values that specialise it.
    source : str or None
        Who decided: a record, the cost model, or the user.
    reason : str or None
        Why, in words; of a layer that stayed dense it is the reason of the refusal.
    expected_us, dense_us, measured_us : float or None
        Microseconds a call: of the chosen kernel as planned, of the dense one, and as measured.
    bytes_dense, bytes_packed : int or None
        The weight before and after.
    error, error_share : float or None
        Largest difference from the dense layer in float64, and as a share of its derived bound:
        below one, rounding explains it.
    history : tuple of (int, float)
        (trial, microseconds) of the fastest kernel so far, one point a trial that was measured
        while tuning; empty for layers that were not tuned.
    findings : tuple of Finding
        Forms that were recognised in the weight's zeros, the most telling one first.
    candidates : tuple of Tried
        The kernels that were compared, the fastest first.
    refusals : mapping of str to str
        Formats that were no candidates, each with its reason.
    bound_by : str or None
        What takes the chosen kernel the longest, by the cost model.
    operations : float or None
        Multiplications and additions of one call with the weight's nonzeros.
    bytes_moved : float or None
        The packed weight, the activations read and the results written, each counted once.
    spy, packed_spy : Spy or None
        Where the nonzeros are: in the weight's own order, and in that of the format. The latter is
        None where rows and columns stay in their places.
    packed_with : tuple of str
        Layers that `packed_spy` shows together with this one, since they are packed as one weight.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str | None = None
    density: float | None = None
    pattern: str | None = None
    nnz: int | None = None
    format: str | None = None
    kernel: str | None = None
    config: Mapping[str, Any] | None = None
    source: str | None = None
    reason: str | None = None
    expected_us: float | None = None
    dense_us: float | None = None
    measured_us: float | None = None
    bytes_dense: int | None = None
    bytes_packed: int | None = None
    error: float | None = None
    error_share: float | None = None
    history: tuple[tuple[int, float], ...] = ()
    findings: tuple[Finding, ...] = ()
    candidates: tuple[Tried, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    bound_by: str | None = None
    operations: float | None = None
    bytes_moved: float | None = None
    spy: Spy | None = None
    packed_spy: Spy | None = None
    packed_with: tuple[str, ...] = ()

    @property
    def explained(self) -> float | None:
        """Share of the zeros that the pattern explains; None without a form."""
        return self.findings[0].explained if self.findings else None

    @property
    def outside(self) -> int | None:
        """Nonzeros where the pattern has none; None without a form, or where it holds exactly."""
        return self.findings[0].violations or None if self.findings else None

    @property
    def is_sparse(self) -> bool:
        """Whether a sparse kernel computes this layer."""
        return self.format not in (None, "dense")


@dataclass(frozen=True)
class Report:
    """All layers of a model that carry weights; `str` gives a table for a terminal.

    Attributes
    ----------
    source : str
        Where the model came from.
    target : str or None
        What it was planned or compiled for; None of an inspection.
    threads : int or None
        Threads that the times hold for.
    layers : tuple of LayerReport
        In the model's order.
    notes : tuple of str
        What else a reader should know, each a sentence.
    totals : mapping of str to int, float or str
        Figures of the whole model, for example ``{"compile_seconds": 41.2}``.
    ceilings : Ceilings or None
        The limits of what it was planned for.
    """

    source: str
    target: str | None = None
    threads: int | None = None
    layers: tuple[LayerReport, ...] = ()
    notes: tuple[str, ...] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Ceilings | None = None

    def without_pictures(self) -> Report:
        """Leave out what takes much room and is only looked at: the spy plots."""
        layers = (replace(layer, spy=None, packed_spy=None) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def summary(self) -> dict[str, Any]:
        """Count layers and bytes.

        Returns
        -------
        dict
            ``layers``; ``sparse`` and ``dense`` once planned; ``nnz`` and ``density`` of the
            profiled weights together; ``bytes_dense`` and ``bytes_packed`` where known.
        """
        found: dict[str, Any] = {"layers": len(self.layers)}
        if any(layer.format is not None for layer in self.layers):
            found["sparse"] = sum(layer.is_sparse for layer in self.layers)
            found["dense"] = sum(layer.format == "dense" for layer in self.layers)
        counted = [layer for layer in self.layers if layer.nnz is not None]
        if counted:
            elements = sum(math.prod(layer.shape) for layer in counted)
            found["nnz"] = sum(layer.nnz or 0 for layer in counted)
            found["density"] = found["nnz"] / elements if elements else 0.0
        for name in ("bytes_dense", "bytes_packed"):
            sizes = [getattr(layer, name) for layer in self.layers]
            if any(size is not None for size in sizes):
                found[name] = sum(size or 0 for size in sizes)
        return found

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as JSON, and write it to `path` if one is given.

        The file is written beside its place and renamed into it. Numbers that JSON lacks are the
        strings ``"inf"``, ``"-inf"`` and ``"nan"``.

        Raises
        ------
        SparseError
            When the file cannot be written.
        """
        data = {"version": VERSION, **asdict(self), "summary": self.summary()}
        for layer in data["layers"]:
            # Every library carries its report, and most layers of most models lack most of these.
            for name in _SPARED:
                if not layer[name]:
                    del layer[name]
        text = json.dumps(_plain(data), indent=2, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as a page of HTML, and write it to `path` if one is given.

        The page stands alone: styles, pictures and the script that sorts its table are inside. The
        file is written beside its place and renamed into it.

        Raises
        ------
        SparseError
            When the file cannot be written.
        """
        from .report_html import render

        text = render(self)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises
        ------
        SparseError
            When the text is no report, or one of a later version.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise SparseError(f"this is not a report: it is not valid JSON ({error})") from None
        version = data.get("version") if isinstance(data, dict) else None
        if not isinstance(version, int):
            raise SparseError("this is not a report: it has no version")
        if version > VERSION:
            raise SparseError(
                f"this report has version {version}, and this program reads up to {VERSION}"
            )
        try:
            layers = [_layer(entry) for entry in data["layers"]]
            others = ("source", "target", "threads", "notes", "totals")
            values = {"layers": layers, **{name: data[name] for name in others}}
            return build(cls, {**values, "ceilings": data.get("ceilings")})
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise SparseError(f"this is not a whole report: {error!r}") from None

    def render(self, width: int | None = None) -> str:
        """Return the table, the totals, the refusals by reason, and the notes.

        Parameters
        ----------
        width : int, optional
            Characters a line; the terminal's width when omitted.
        """
        width = width or shutil.get_terminal_size((120, 24)).columns
        parts = [self._heading(), _table(self.layers, width), self._total_lines(width)]
        parts += [_refusals(self.layers, width)]
        parts += ["\n".join(_hang(f"note: {note}", width) for note in self.notes)]
        return "\n\n".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.render()

    def _heading(self) -> str:
        parts = [self.source or "model"]
        if self.target is not None:
            parts.append(f"for {self.target}")
        if self.threads is not None:
            parts.append(f"on {self.threads} thread{'s' if self.threads != 1 else ''}")
        return " ".join(parts)

    def _total_lines(self, width: int) -> str:
        found = self.summary()
        parts = [f"{found['layers']} layer{'s' if found['layers'] != 1 else ''} with weights"]
        if "sparse" in found:
            parts.append(f"{found['sparse']} sparse, {found['dense']} dense")
        if "density" in found:
            parts.append(f"{format_percent(found['density'])} of the weights are nonzero")
        if "bytes_dense" in found:
            size = f"{format_bytes(found['bytes_dense'])} dense"
            if "bytes_packed" in found:
                size += f", {format_bytes(found['bytes_packed'])} packed"
            parts.append(size)
        lines = [
            textwrap.fill("total: " + "; ".join(parts), max(width, 40), subsequent_indent="  ")
        ]
        lines += [f"{name.replace('_', ' ')}: {_number(v)}" for name, v in self.totals.items()]
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """Write a number of bytes with a binary unit, for example ``1.5 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_percent(share: float) -> str:
    """Write a share as a percentage, for example ``90.0 %``."""
    # Rounded, hardly any would read as none, and nearly all as all.
    if 0 < share < 0.0005:
        return "<0.1 %"
    if 0.9995 <= share < 1:
        return ">99.9 %"
    return f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Column:
    """A column of the table: what it shows of a layer's attribute, and how."""

    title: str
    attribute: str
    show: Callable[[Any], str] = str
    number: bool = False


_COLUMNS: tuple[_Column, ...] = (
    _Column("layer", "name"),
    _Column("op", "op"),
    _Column("shape", "shape", lambda shape: "x".join(map(str, shape)) or "scalar"),
    _Column("dtype", "dtype"),
    _Column("nonzero", "density", format_percent, number=True),
    _Column("nnz", "nnz", "{:,}".format, number=True),
    _Column("pattern", "pattern"),
    _Column("explains", "explained", format_percent, number=True),
    _Column("nonzeros outside", "outside", "{:,}".format, number=True),
    _Column("format", "format"),
    _Column("kernel", "kernel"),
    _Column("decided by", "source"),
    _Column("expected us", "expected_us", "{:,.1f}".format, number=True),
    _Column("dense us", "dense_us", "{:,.1f}".format, number=True),
    _Column("measured us", "measured_us", "{:,.1f}".format, number=True),
    _Column("dense size", "bytes_dense", format_bytes, number=True),
    _Column("packed size", "bytes_packed", format_bytes, number=True),
    _Column("error", "error", "{:.1e}".format, number=True),
    _Column("of its bound", "error_share", "{:.2f}".format, number=True),
)


# What a narrow terminal does without, the first first; JSON has it all.
_EXPENDABLE = (
    "nnz",
    "explained",
    "error_share",
    "dtype",
    "bytes_dense",
    "source",
    "op",
    "error",
    "kernel",
    "dense_us",
    "outside",
    "pattern",
)


def _table(layers: tuple[LayerReport, ...], width: int) -> str:
    columns = [column for column in _COLUMNS if _says_something(column, layers)]
    if not layers:
        return ""
    widths = _widths(columns, layers, width)
    dropped: list[str] = []
    for attribute in _EXPENDABLE:
        if _extent(widths) <= width:
            break
        dropped += [column.title for column in columns if column.attribute == attribute]
        columns = [column for column in columns if column.attribute != attribute]
        widths = _widths(columns, layers, width)
    lines = _row([column.title for column in columns], columns, widths)
    lines.append(_GAP.join("-" * extent for extent in widths))
    for layer in layers:
        lines += _row([_cell(column, layer) for column in columns], columns, widths)
    if dropped:
        lines.append(_hang(f"too narrow to show {', '.join(dropped)}", width))
    return "\n".join(lines)


def _says_something(column: _Column, layers: tuple[LayerReport, ...]) -> bool:
    values = [getattr(layer, column.attribute) for layer in layers]
    if column.attribute == "dtype":
        return any(value not in (None, "float32") for value in values)
    return any(value is not None for value in values)


def _cell(column: _Column, layer: LayerReport) -> str:
    value = getattr(layer, column.attribute)
    return "" if value is None else column.show(value)


def _extent(widths: list[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _widths(columns: list[_Column], layers: tuple[LayerReport, ...], width: int) -> list[int]:
    """Give each column what it needs, then take from the widest texts what the terminal lacks."""
    widths = []
    for column in columns:
        title = max(map(len, column.title.split()))
        widths.append(max(title, *(len(_cell(column, layer)) for layer in layers)))
    texts = [index for index, column in enumerate(columns) if not column.number]
    while _extent(widths) > width:
        # A layer's name is what a reader looks for, so that it is folded last.
        spare = [
            widths[i] - (_NARROWEST_NAME if columns[i].attribute == "name" else _NARROWEST)
            for i in texts
        ]
        if max(spare) <= 0:
            break
        widths[texts[spare.index(max(spare))]] -= 1
    return widths


def _row(cells: list[str], columns: list[_Column], widths: list[int]) -> list[str]:
    """Lay out one row of the table; cells that are too long go on below themselves."""
    wrapped = [
        textwrap.wrap(cell, extent) or [""] for cell, extent in zip(cells, widths, strict=True)
    ]
    lines = []
    for index in range(max(map(len, wrapped))):
        parts = []
        for pieces, column, extent in zip(wrapped, columns, widths, strict=True):
            piece = pieces[index] if index < len(pieces) else ""
            parts.append(piece.rjust(extent) if column.number else piece.ljust(extent))
        lines.append(_GAP.join(parts).rstrip())
    return lines


def _refusals(layers: tuple[LayerReport, ...], width: int) -> str:
    """Group the layers that did not become sparse by their reason."""
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason and not layer.is_sparse:
            by_reason.setdefault(layer.reason, []).append(layer.name)
    lines = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:_NAMES_IN_A_REASON])
        more = len(names) - _NAMES_IN_A_REASON
        shown += f" and {more} more" if more > 0 else ""
        lines.append(_hang(f"{reason}: {shown}", width))
    return "\n".join(["not made sparse:", *lines]) if lines else ""


def _hang(text: str, width: int) -> str:
    return textwrap.fill(
        text,
        max(width, 40),
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(value: Any) -> Any:
    """Turn NumPy scalars, tuples and numbers that JSON lacks into what JSON has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


# Left out of JSON where they hold nothing.
_SPARED = ("history", "findings", "candidates", "refusals", "spy", "packed_spy", "packed_with")
_FLOATS = (
    "density",
    "expected_us",
    "dense_us",
    "measured_us",
    "error",
    "error_share",
    "operations",
    "bytes_moved",
)


def _layer(entry: Mapping[str, Any]) -> LayerReport:
    # Fields that a later writer added are no reason to refuse the rest.
    known = {item.name for item in fields(LayerReport)}
    values = {name: value for name, value in entry.items() if name in known}
    values["shape"] = tuple(values["shape"])
    for name in _FLOATS:
        if values.get(name) is not None:
            values[name] = float(values[name])
    points = values.get("history", ())
    values["history"] = tuple((int(trial), float(time)) for trial, time in points)
    values["findings"] = tuple(map(Finding.from_data, values.get("findings", ())))
    values["candidates"] = tuple(map(_tried, values.get("candidates", ())))
    for name in ("spy", "packed_spy"):
        if values.get(name) is not None:
            values[name] = Spy.from_data(values[name])
    return build(LayerReport, values)


def _tried(entry: Mapping[str, Any]) -> Tried:
    # A time that is not finite is written as text.
    return build(Tried, {**entry, "us": float(entry["us"])})
