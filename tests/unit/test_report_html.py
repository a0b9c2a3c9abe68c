"""The HTML page of a report: whole, self-contained, safe with any name, and silent on unknowns."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tvm_sparse.errors import SparseError
from tvm_sparse.findings import Finding
from tvm_sparse.layer_details import most_cells
from tvm_sparse.report import Ceilings, LayerReport, Report, Tried
from tvm_sparse.report_html import render
from tvm_sparse.spy import LEVELS, Spy

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
NOISE = np.random.default_rng(0).integers(0, LEVELS, 128 * 128, np.uint8).tobytes()
DETAILED = replace(
    SPARSE,
    candidates=(
        Tried("tiled", "spmm", {"mr": 4, "nt": 64}, 98.25, measured=True),
        Tried("ell", "rows", {}, 49.125),
        Tried("dense", "gemm", {"mr": 6}, 604.0),
    ),
    refusals={"n_of_m": "only for matrix products"},
    bound_by="multiply-adds",
    operations=6.0e7,
    bytes_moved=2.4e6,
    spy=Spy.of(2, 3, 0.5, bytes([0, 1, 2, 3, 4, 15])),
    packed_spy=Spy.of(1, 2, 1.0, bytes([15, 0])),
    packed_with=("fc2",),
)
CEILINGS = Ceilings(gflops=256.0, memory_gbytes=32.0)
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
        if not {"style", "script"} & set(self._open):
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
        """The titles of the columns of the table of all layers."""
        head = self.text.partition('id="layers">')[2].partition("</thead>")[0]
        return re.findall(r"<th[^>]*>([^<]*)</th>", head)


def report(*layers: LayerReport, **more: object) -> Report:
    return Report(source="bert.onnx", target="x86-64-v4", threads=4, layers=layers, **more)  # type: ignore[arg-type]


def page(*layers: LayerReport, **more: object) -> Page:
    return Page(render(report(*layers, **more)))


def plots(found: Page) -> list[ElementTree.Element]:
    """The plots of searches."""
    return with_path(found, "line")


def with_path(found: Page, kind: str) -> list[ElementTree.Element]:
    """The drawings that have a path of a class."""
    wanted = f"path[@class='{kind}']"
    return [drawing for drawing in found.drawings if drawing.find(wanted) is not None]


EXAMPLES = {
    "everything": report(
        DETAILED, DENSE, notes=("one", "two"), totals={"compile_seconds": 41.25}, ceilings=CEILINGS
    ),
    "inspection": Report("m.onnx", layers=(FOUND,)),
    "no layers": Report(""),
    "bad numbers": report(
        replace(SPARSE, expected_us=math.nan, dense_us=math.inf, error_share=math.nan),
        replace(SPARSE, expected_us=None, dense_us=-1.0, history=((0, math.nan), (1, math.inf))),
        replace(DETAILED, operations=math.inf, bytes_moved=math.nan),
        replace(DETAILED, candidates=(Tried("tiled", "spmm", {}, math.inf),), bytes_moved=0.0),
        totals={"compile_seconds": "nan", "model_us": math.inf},
        ceilings=CEILINGS,
    ),
    "no roof": report(DETAILED, ceilings=Ceilings(math.inf, 0.0)),
    "a GPU": report(DETAILED, ceilings=Ceilings(6e4, 3350.0, 6e5)),
    "zeros": report(replace(SPARSE, expected_us=0.0, dense_us=0.0, history=((0, 0.0),))),
    "nasty": report(
        replace(
            DETAILED, name=NASTY, op=NASTY, reason=NASTY, kernel=NASTY, config={NASTY: NASTY},
            pattern=NASTY, format=NASTY, source=NASTY, dtype=NASTY, bound_by=NASTY,
            candidates=(Tried(NASTY, NASTY, {NASTY: NASTY}, 1.0),), refusals={NASTY: NASTY},
            packed_with=(NASTY,),
        ),
        ceilings=CEILINGS,
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
def test_a_page_refers_to_nothing_outside(example: Report) -> None:
    found = Page(render(example))
    assert not {"link", "iframe", "object", "use", "image", "base", "form"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert not names & {"srcset", "style", "action", "xlink:href"}
    for name, value in found.attributes:
        if name == "src":
            assert value is not None and value.startswith("data:image/png;base64,")
        if name == "href":
            assert value is not None and re.fullmatch(r"#weight-\d+", value)
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in found.text


@EVERY
def test_a_page_runs_its_own_script_and_nothing_else(example: Report) -> None:
    found = Page(render(example))
    assert found.tags.count("script") == found.tags.count("style") == 1
    policy = found.text.partition('Content-Security-Policy" content="')[2].partition('">')[0]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        text = found.text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@EVERY
def test_names_of_elements_are_unique_and_links_lead_to_them(example: Report) -> None:
    attributes = Page(render(example)).attributes
    names = [value for name, value in attributes if name == "id"]
    assert len(set(names)) == len(names)
    assert {value for name, value in attributes if name == "href"} <= {f"#{name}" for name in names}


@EVERY
def test_pictures_and_plots_are_described_and_headings_are_in_order(example: Report) -> None:
    found = Page(render(example))
    assert found.tags.count("img") == sum(bool(v) for name, v in found.attributes if name == "alt")
    for drawing in found.drawings:
        assert drawing.findtext("title") or drawing.get("aria-hidden") == "true"
    levels = [int(tag[1]) for tag in found.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


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
    tables = re.findall(r'<div class="scroll"[^>]*>\s*<table', text)
    assert len(tables) == text.count("<table") > 0
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
        "before, dense 674.0 us",
        "after, expected 168.2 us",
        "faster 4.0x",
        "compiled in 41.2 s",
        "model us 2310",
    ):
        assert words in said


def test_notes_are_shown_and_no_empty_list_is() -> None:
    assert "batch is symbolic" in page(SPARSE, notes=("batch is symbolic",)).said
    assert "<ul" not in render(report(SPARSE))


def test_the_table_says_all_of_a_layer() -> None:
    found = page(SPARSE, DENSE)
    row = found.text.partition('<a href="#weight-0">fc1</a></th>')[2].partition("</tr>")[0]
    assert re.findall("<td[^>]*>([^<]*)</td>", row) == [
        *("matmul", "3072x768", "90.0 %", "block:4x4", "tiled", "spmm"),
        *("604.0", "98.2", "6.1x", "fastest of 12", "record", "9.0 MiB", "1.3 MiB", "0.013"),
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


def test_numbers_are_sorted_by_what_they_are_and_not_by_what_is_written() -> None:
    text = page(replace(SPARSE, bytes_dense=3 << 20)).text
    assert f'data-sort="{3 << 20}">3.0 MiB<' in text


def test_names_are_text_whatever_they_are() -> None:
    found = page(replace(DETAILED, name=NASTY), replace(DENSE, history=HISTORY), ceilings=CEILINGS)
    assert NASTY not in found.text
    # The segments before and after, the bar and its title, the table, the weight's heading, the
    # point, the plot's caption and title.
    assert found.said.count(NASTY) == 9


def test_long_names_can_be_broken_between_their_steps() -> None:
    assert "encoder.<wbr>layer.<wbr>0" in render(report(replace(FOUND, name="encoder.layer.0")))


# ---------------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------------


def bars(found: Page) -> list[tuple[str, float, float | None]]:
    """Every bar: its title, its length, and the length of the outline behind it."""
    result = []
    for drawing in found.drawings:
        if drawing.get("preserveAspectRatio") and drawing.find("rect/title") is None:
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


def test_the_whole_network_is_a_bar_before_and_after() -> None:
    found = page(SPARSE, DENSE)
    rows = [drawing for drawing in found.drawings if drawing.find("rect/title") is not None]
    assert [row.findtext("title") for row in rows] == [
        "before: all dense, 2 layers: 674.0 us",
        "after: expected, 2 layers: 168.2 us",
    ]
    (before, after) = ([float(part.get("width", "")) for part in row.iter("rect")] for row in rows)
    assert sum(before) == pytest.approx(100, abs=0.5)
    assert sum(after) == pytest.approx(100 * 168.25 / 674, abs=0.5)
    assert [part.get("class") for part in rows[1].iter("rect")] == ["sparse", "plain"]


def test_without_times_of_dense_layers_there_is_no_before() -> None:
    assert "before" not in page(replace(SPARSE, dense_us=None), replace(DENSE, dense_us=None)).said


# ---------------------------------------------------------------------------------------------
# Weight by weight
# ---------------------------------------------------------------------------------------------


def part_of(found: Page, number: int) -> str:
    return found.text.partition(f'id="weight-{number}"')[2].partition("</details>")[0]


def test_a_weight_says_why_it_became_what_it_is() -> None:
    part = part_of(page(DETAILED), 0)
    for words in (
        "tiled: fastest of 12 (decided by: record).",
        "Before 604.0 us, after 98.2 us: 6.1x.",
        "Kernel spmm: mr=4, nt=64.",
        "Bound by multiply-adds.",
        "9.0 MiB dense, 1.3 MiB packed.",
    ):
        assert words in part


def test_candidates_have_their_times_and_refusals_their_reasons() -> None:
    part = part_of(page(DETAILED), 0)
    rows = [
        re.findall(r">([^<>]+)</t[dh]>", row)
        for row in re.findall(r"<tr class.*?</tr>", part, re.S)
    ]
    assert rows == [
        ["tiled", "spmm: mr=4, nt=64", "98.2", "measured", "chosen"],
        ["ell", "rows", "49.1", "expected", "2.00x faster"],
        ["dense", "gemm: mr=6", "604.0", "expected", "6.15x slower"],
        ["n_of_m", "refused: only for matrix products"],
    ]


def test_candidates_of_a_tuned_layer_are_held_against_its_measured_one() -> None:
    part = part_of(page(replace(DETAILED, expected_us=None, measured_us=98.25)), 0)
    assert "chosen" in part and "2.00x faster" in part


def test_the_weight_that_takes_longest_is_open() -> None:
    found = page(DENSE, DETAILED)
    assert 'id="weight-1" open>' in found.text and 'id="weight-0">' in found.text


def test_pictures_are_whole_pngs_of_the_cells() -> None:
    sources = [value or "" for name, value in page(DETAILED).attributes if name == "src"]
    assert [pixels(source) for source in sources] == [
        [[0, 1, 2], [3, 4, 15]],
        [[15, 0]],
    ]


def pixels(source: str) -> list[list[int]]:
    """Read a PNG of four bits a pixel, and assert that its chunks are whole."""
    data = base64.b64decode(source.partition(",")[2])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + length
    width, height, bits, colour = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    assert (bits, colour) == (4, 3) and len(chunks[b"PLTE"]) == 3 * len(chunks[b"tRNS"]) == 48
    # The more nonzeros, the more ink.
    assert sorted(chunks[b"tRNS"]) == list(chunks[b"tRNS"]) and chunks[b"tRNS"][0] == 0
    rows = zlib.decompress(chunks[b"IDAT"])
    stride = 1 + -(-width // 2)
    assert len(rows) == height * stride
    found = []
    for first in range(0, len(rows), stride):
        assert rows[first] == 0
        halves = [half for byte in rows[first + 1 : first + stride] for half in divmod(byte, 16)]
        found.append(halves[:width])
    return found


def test_layers_that_are_packed_as_one_are_named_below_their_picture() -> None:
    assert "packed order of tiled, with fc2" in page(DETAILED).said
    stays = page(replace(DETAILED, packed_spy=None, packed_with=()))
    assert "Rows and columns stay in their places" in stays.said


def test_a_weight_without_details_has_a_part_without_pictures_and_candidates() -> None:
    part = part_of(page(SPARSE), 0)
    assert "img" not in part and "Candidates" not in part and "fastest of 12" in part


@pytest.mark.parametrize("layers", [54, 74, 400])
def test_a_page_stays_below_five_megabytes(layers: int) -> None:
    """Pictures of noise, as large as they may be, of networks as large as BERT and larger."""
    side = math.isqrt(most_cells(layers))
    noise = Spy.of(side, side, 0.5, NOISE[: side * side])
    layer = replace(DETAILED, spy=noise, packed_spy=noise, candidates=DETAILED.candidates * 3)
    long_name = "/bert/encoder/layer.{}/attention/output/dense/MatMul"
    rows = [replace(layer, name=long_name.format(number)) for number in range(layers)]
    assert len(render(report(*rows, ceilings=CEILINGS))) < 5_000_000


# ---------------------------------------------------------------------------------------------
# The roofline
# ---------------------------------------------------------------------------------------------


def rooflines(found: Page) -> list[ElementTree.Element]:
    return with_path(found, "roof")


def test_every_layer_is_a_point_below_the_roof() -> None:
    (plot,) = rooflines(
        page(DETAILED, replace(DETAILED, name="other", format="dense"), ceilings=CEILINGS)
    )
    points = list(plot.iter("circle"))
    # 6e7 operations in 98.25 us, 2.4e6 bytes.
    assert points[0].findtext("title") == "fc1: 610.7 GFLOP/s, 25.00 operations a byte"
    assert [point.get("class") for point in points] == ["sparse", "plain"]


def test_a_point_on_the_roof_is_drawn_on_it() -> None:
    # 8 operations a byte are the ridge of 256 GFLOP/s and 32 GB/s.
    layer = replace(DETAILED, operations=8e6, bytes_moved=1e6, expected_us=8e6 / 256e3)
    (plot,) = rooflines(page(layer, ceilings=CEILINGS))
    (point,), (roof,) = plot.findall("circle"), plot.findall("path[@class='roof']")
    corner = re.search(r"L([\d.]+) ([\d.]+)H", roof.get("d", ""))
    assert corner is not None
    assert corner.groups() == (point.get("cx"), point.get("cy"))


def test_a_gpu_has_a_second_roof_of_its_tensor_cores() -> None:
    (plot,) = rooflines(Page(render(EXAMPLES["a GPU"])))
    assert len(plot.findall("path[@class='roof']")) == 2
    assert {"multiply-adds", "tensor cores"} <= {text.text for text in plot.iter("text")}


@pytest.mark.parametrize(
    "example",
    [report(DETAILED), report(SPARSE, ceilings=CEILINGS), EXAMPLES["no roof"]],
    ids=["no machine", "no work", "no limits"],
)
def test_what_is_not_known_has_no_roofline(example: Report) -> None:
    assert "Roofline" not in Page(render(example)).said


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
