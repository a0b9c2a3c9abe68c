"""The HTML page of a report: whole, self-contained, safe with any name, and silent on unknowns."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tvm_sparse.errors import SparseError
from tvm_sparse.findings import Finding
from tvm_sparse.report import LayerReport, Report
from tvm_sparse.report_html import render

HISTORY = ((1, 140.25), (2, 140.25), (4, 110.5), (5, 98.25), (9, 98.25))
FOUND = LayerReport(
    name="fc1",
    op="matmul",
    shape=(3072, 768),
    dtype="float32",
    density=0.1,
    pattern="block:4x4",
    nnz=235930,
    bytes_dense=9437184,
)
SPARSE = replace(
    FOUND,
    format="tiled",
    kernel="spmm",
    config={"mr": 4, "nt": 64},
    source="record",
    reason="fastest of 12",
    expected_us=98.25,
    dense_us=604.0,
    bytes_packed=1363149,
    error=1e-6,
    error_share=0.013,
    history=HISTORY,
)
DENSE = replace(
    SPARSE,
    name="head",
    format="dense",
    kernel="dense_panels",
    config={},
    source="model",
    reason="zeros do not pay here",
    expected_us=70.0,
    dense_us=70.0,
    bytes_packed=9437184,
    history=(),
)
# These have no end tag in HTML.
VOID = {"meta", "link", "br", "wbr", "hr", "img", "input"}
NASTY = "<script>alert('&\"')</script>"


class Page(HTMLParser):
    """Reads a page, and asserts that its tags are closed in the order that they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self._open, f"<{tag}/> means <{tag}> in HTML"
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style"} & set(self._open):
            self.words.append(data)

    @property
    def said(self) -> str:
        """What a reader sees, and the titles."""
        return " ".join("".join(self.words).split())

    @property
    def drawings(self) -> list[ElementTree.Element]:
        """Every SVG, as strict XML."""
        return [
            ElementTree.fromstring(drawing)
            for drawing in re.findall(r"<svg.*?</svg>", self.text, flags=re.DOTALL)
        ]

    @property
    def headers(self) -> list[str]:
        """The titles of the table's columns."""
        head = self.text.partition("<thead>")[2].partition("</thead>")[0]
        return re.findall(r"<th[^>]*>([^<]*)</th>", head)


def report(*layers: LayerReport, **more: object) -> Report:
    return Report(source="bert.onnx", target="x86-64-v4", threads=4, layers=layers, **more)  # type: ignore[arg-type]


def page(*layers: LayerReport, **more: object) -> Page:
    return Page(render(report(*layers, **more)))


def plots(found: Page) -> list[ElementTree.Element]:
    return [drawing for drawing in found.drawings if drawing.find("path") is not None]


EXAMPLES = {
    "everything": report(SPARSE, DENSE, notes=("one", "two"), totals={"compile_seconds": 41.25}),
    "inspection": Report("m.onnx", layers=(FOUND,)),
    "no layers": Report(""),
    "bad numbers": report(
        replace(SPARSE, expected_us=math.nan, dense_us=math.inf, error_share=math.nan),
        replace(SPARSE, expected_us=None, dense_us=-1.0, history=((0, math.nan), (1, math.inf))),
        totals={"compile_seconds": "nan", "model_us": math.inf},
    ),
    "zeros": report(replace(SPARSE, expected_us=0.0, dense_us=0.0, history=((0, 0.0),))),
    "nasty": report(
        replace(
            SPARSE, name=NASTY, op=NASTY, reason=NASTY, kernel=NASTY, config={NASTY: NASTY},
            pattern=NASTY, format=NASTY, source=NASTY, dtype=NASTY,
        ),
        notes=(NASTY,),
        totals={NASTY: NASTY},
    ),
    "unwritable": report(replace(SPARSE, name="a\x00b\x1b[31m\udc80\ufffe")),
    "numpy": report(replace(SPARSE, expected_us=np.float32(9.5), dense_us=np.float64(20))),
}  # fmt: skip
EVERY = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


# ---------------------------------------------------------------------------------------------
# Any page
# ---------------------------------------------------------------------------------------------


@EVERY
def test_a_page_is_well_formed_and_its_drawings_are_xml(example: Report) -> None:
    found = Page(render(example))
    assert found.text.startswith("<!DOCTYPE html>")
    assert found.tags.count("svg") == len(found.drawings)
    found.text.encode("utf-8")


@EVERY
def test_a_page_refers_to_nothing_outside_and_runs_nothing(example: Report) -> None:
    found = Page(render(example))
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {name for name in names if name.startswith("on") or name.endswith("href")}
    assert not names & {"src", "srcset", "style", "action"}
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in found.text


@EVERY
def test_a_page_draws_only_what_is_a_number(example: Report) -> None:
    for drawing in Page(render(example)).drawings:
        for part in drawing.iter():
            for name, value in part.attrib.items():
                if name in ("d", "x", "y", "cx", "cy", "width", "height"):
                    assert not re.search("nan|inf|e[-+]", value), (name, value)


def test_a_page_suits_phones_and_the_dark() -> None:
    text = render(report(SPARSE))
    assert '<meta name="viewport" content="width=device-width' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert re.search(r'<div class="scroll"[^>]*>\s*<table>', text)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", text)


# ---------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------


def test_the_head_sums_the_model_up() -> None:
    said = page(SPARSE, DENSE, totals={"compile_seconds": 41.25, "model_us": 2310.4}).said
    for words in (
        "bert.onnx",
        "target x86-64-v4",
        "threads 4",
        "sparse layers 1 of 2",
        "zeros 90.0 %",
        "weights, dense 18.0 MiB",
        "weights, packed 10.3 MiB",
        "compiled in 41.2 s",
        "model us 2310",
    ):
        assert words in said


def test_notes_are_shown_and_no_empty_list_is() -> None:
    assert "batch is symbolic" in page(SPARSE, notes=("batch is symbolic",)).said
    assert "<ul" not in render(report(SPARSE))


def test_the_table_says_all_of_a_layer() -> None:
    found = page(SPARSE, DENSE)
    row = found.text.partition('<th scope="row">fc1</th>')[2].partition("</tr>")[0]
    assert re.findall("<td[^>]*>([^<]*)</td>", row) == [
        *("matmul", "3072x768", "90.0 %", "block:4x4", "tiled", "spmm: mr=4, nt=64"),
        *("98.2", "604.0", "6.1x", "9.0 MiB", "1.3 MiB", "record", "fastest of 12", "0.013"),
    ]
    assert "below one is good" in found.said


def test_layers_stand_in_the_order_of_the_model() -> None:
    text = render(report(DENSE, SPARSE)).partition("<tbody>")[2]
    assert text.index(">head<") < text.index(">fc1<")


def test_an_inspection_has_no_planned_columns_and_no_charts() -> None:
    found = Page(render(Report("m.onnx", layers=(FOUND,))))
    assert found.headers == ["layer", "op", "shape", "zeros", "pattern", "dense size"]
    assert not found.drawings
    for word in ("sparse", "target", "Where the time goes", "How tuning went", "Error share"):
        assert word not in found.said


def test_a_form_that_nearly_holds_is_shown_with_the_nonzeros_outside_it() -> None:
    nearly = replace(FOUND, findings=(Finding("2:4", 12, 0.95, 0.93, -40.0),))
    found = Page(render(Report("m.onnx", layers=(nearly,))))
    assert found.headers[5:7] == ["explains", "nonzeros outside"]
    assert "95.0 %" in found.text and ">12<" in found.text
    assert "the share of the zeros that lie where the pattern wants them" in found.said


def test_a_model_without_weights_has_a_page_too() -> None:
    found = Page(render(Report("empty.onnx")))
    assert "no layers that carry weights" in found.said
    assert "table" not in found.tags


def test_the_type_is_shown_only_where_it_is_not_float32() -> None:
    assert "dtype" not in page(SPARSE).headers
    assert "dtype" in page(SPARSE, replace(DENSE, dtype="float64")).headers


def test_measured_times_have_a_column_once_there_are_any() -> None:
    assert "measured us" not in page(SPARSE).headers
    assert "measured us" in page(SPARSE, replace(DENSE, measured_us=71.0)).headers


@pytest.mark.parametrize(
    "changes",
    [{"dense_us": None}, {"expected_us": None}, {"expected_us": 0.0}, {"dense_us": math.nan}],
)
def test_no_ratio_is_made_up(changes: dict[str, float | None]) -> None:
    assert "faster" not in page(replace(SPARSE, **changes), DENSE).headers  # type: ignore[arg-type]


def test_names_are_text_whatever_they_are() -> None:
    found = page(replace(SPARSE, name=NASTY), replace(DENSE, history=HISTORY))
    assert NASTY not in found.text
    # The table, the bar and its title, the plot's caption and title.
    assert found.said.count(NASTY) == 5


def test_long_names_can_be_broken_between_their_steps() -> None:
    assert "encoder.<wbr>layer.<wbr>0" in render(report(replace(FOUND, name="encoder.layer.0")))


# ---------------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------------


def bars(found: Page) -> list[tuple[str, float, float | None]]:
    """Every bar: its title, its length, and the length of the outline behind it."""
    result = []
    for drawing in found.drawings:
        if drawing.get("preserveAspectRatio"):
            *outline, bar = drawing.iter("rect")
            behind = float(outline[0].get("width", "")) if outline else None
            title = drawing.findtext("title") or ""
            result.append((title, float(bar.get("width", "")), behind))
    return result


def test_bars_are_as_long_as_times_with_the_dense_time_behind() -> None:
    found = page(DENSE, SPARSE)
    assert bars(found) == [
        ("fc1: 98.2 us expected, 604.0 us dense", 16.27, 100.0),
        ("head: 70.0 us expected", 11.59, None),
    ]
    assert "2 layers together: 168.2 us expected, 674.0 us dense." in found.said


def test_measured_times_are_shown_instead_of_expected_ones() -> None:
    found = page(DENSE, replace(SPARSE, measured_us=120.0))
    assert [title for title, _, _ in bars(found)] == ["fc1: 120.0 us measured, 604.0 us dense"]
    assert "1 layer together: 120.0 us measured, 604.0 us dense as planned." in found.said


def test_the_sum_is_of_what_can_be_compared() -> None:
    found = page(SPARSE, replace(DENSE, dense_us=None))
    assert "1 layer together: 98.2 us expected, 604.0 us dense." in found.said
    found = page(replace(SPARSE, dense_us=None), replace(DENSE, dense_us=math.nan))
    assert "2 layers together: 168.2 us expected." in found.said


def test_the_largest_are_shown_and_the_rest_is_summed() -> None:
    layers = [replace(SPARSE, name=f"fc{i}", expected_us=float(i)) for i in range(1, 24)]
    found = page(*layers)
    assert [title.split(":")[0] for title, _, _ in bars(found)] == [
        f"fc{i}" for i in range(23, 3, -1)
    ]
    assert "and 3 more layers: 6.0 us together" in found.said


def test_a_layer_without_a_time_has_no_bar() -> None:
    found = page(SPARSE, replace(DENSE, expected_us=None), replace(DENSE, expected_us=math.nan))
    assert len(bars(found)) == 1


def test_numpy_times_are_times_too() -> None:
    assert len(bars(Page(render(EXAMPLES["numpy"])))) == 1


# ---------------------------------------------------------------------------------------------
# How tuning went
# ---------------------------------------------------------------------------------------------


def test_a_plot_has_its_axes_its_end_and_what_dense_takes() -> None:
    (plot,) = plots(page(SPARSE, DENSE))
    title = "fc1: 98.2 us after 5 measured trials, from 140.2 us; dense 604.0 us"
    assert plot.findtext("title") == title
    written = [text.text for text in plot.iter("text")]
    assert {"us", "trial", "98.2", "dense", "100", "200", "500", "2", "8"} <= set(written)
    assert [path.get("class") for path in plot.iter("path")].count("dense") == 1


def test_the_line_goes_down_in_steps_and_ends_at_the_last_trial() -> None:
    (plot,) = plots(page(SPARSE))
    (line,) = (path.get("d", "") for path in plot.iter("path") if path.get("class") == "line")
    assert re.fullmatch(r"M[\d.]+ [\d.]+(H[\d.]+V[\d.]+){2}H[\d.]+", line)
    heights = [float(y) for y in re.findall(r"(?: |V)([\d.]+)", line)]
    assert heights == sorted(heights)
    (end,) = plot.iter("circle")
    assert line.endswith(f"H{end.get('cx')}") and f"V{end.get('cy')}" in line


def test_layers_that_were_tuned_together_share_a_plot() -> None:
    others = [replace(SPARSE, name=f"fc{i}") for i in range(2, 5)]
    alone = replace(SPARSE, name="alone", history=HISTORY[:3])
    found = page(SPARSE, alone, *others)
    titles = [plot.findtext("title", "").split(":")[0] for plot in plots(found)]
    assert titles == ["fc1", "alone"]
    captions = found.text.partition("How tuning went")[2]
    assert "fc1 and 3 more" in captions
    assert all(f"<li>{layer.name}</li>" in captions for layer in others)


def test_without_a_dense_time_there_is_no_line_of_it() -> None:
    (plot,) = plots(page(replace(SPARSE, dense_us=None)))
    assert not [path for path in plot.iter("path") if path.get("class") == "dense"]
    assert "dense" not in [text.text for text in plot.iter("text")]


def test_layers_that_were_not_tuned_have_no_plots() -> None:
    found = page(replace(SPARSE, history=()), DENSE)
    assert not plots(found)
    assert "How tuning went" not in found.said


@pytest.mark.parametrize(
    "history",
    [
        ((0, 5.0),),
        ((3, 5.0), (3, 5.0)),
        ((0, 0.001), (1000, 0.0009)),
        ((0, 1e6), (7, 3.0)),
        ((0, math.inf), (1, 5.0), (2, math.nan), (3, 4.0)),
        tuple((trial, 1000.0 / (trial + 1)) for trial in range(2000)),
    ],
)
def test_any_history_is_drawn_within_its_picture(history: tuple[tuple[int, float], ...]) -> None:
    (plot,) = plots(page(replace(SPARSE, history=history)))
    _, _, width, height = map(float, plot.get("viewBox", "").split())
    heights = []
    for text in plot.iter("text"):
        x, y = float(text.get("x", "")), float(text.get("y", ""))
        assert 0 <= x <= width and 0 <= y <= height
        if text.get("text-anchor") == "end":
            heights.append(y)
    # At least two ticks, and the unit, none over another.
    assert len(heights) >= 3
    assert all(abs(a - b) > 8 for i, a in enumerate(heights) for b in heights[:i])


def test_labels_are_not_written_over_each_other() -> None:
    for dense in (98.0, 98.25, 98.5):
        (plot,) = plots(page(replace(SPARSE, dense_us=dense)))
        at = {text.text: float(text.get("y", "")) for text in plot.iter("text")}
        assert abs(at["dense"] - at["98.2"]) >= 12


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def test_the_file_holds_the_same_text_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    example = EXAMPLES["unwritable"]
    assert example.to_html(path) == path.read_text(encoding="utf-8") == render(example)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_without_a_path_nothing_is_written() -> None:
    assert report(SPARSE).to_html() == render(report(SPARSE))


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SparseError, match="cannot be written"):
        report(SPARSE).to_html(tmp_path / "missing" / "report.html")


def test_a_report_that_went_through_json_has_the_same_page() -> None:
    example = EXAMPLES["everything"]
    assert render(Report.from_json(example.to_json())) == render(example)
