"""The report's page in a real browser: on a phone and a desktop, in the light and in the dark.

`TVM_SPARSE_BROWSER` names the browser to use, `TVM_SPARSE_SCREENSHOTS` a folder for what it saw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_sparse.formats import FORMATS
from tvm_sparse.formats.spies import packed_spy, spy
from tvm_sparse.report import Ceilings, LayerReport, Report, Tried

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'tvm-sparse[browser]'"
)

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (360, 740), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
NASTY = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"


def layer(number: int, name: str, zeros: float, weight_format: str) -> LayerReport:
    """A layer as the compiler describes one, its pictures drawn from a weight."""
    rng = np.random.default_rng(number)
    weight = rng.standard_normal((96 + 32 * number, 256)).astype(np.float32)
    weight *= rng.random(weight.shape) >= zeros
    config = {"mr": 4, "kb": 64, **({"share": 2} if weight_format == "sliced_ell" else {})}
    order = FORMATS[weight_format].order(FORMATS[weight_format].pack(weight, config))
    us = 20.0 + 90 * number * (1 - zeros)
    return LayerReport(
        name=name,
        op="matmul",
        shape=weight.shape,
        density=1 - zeros,
        pattern="unstructured",
        nnz=int(np.count_nonzero(weight)),
        format=weight_format,
        kernel="a_kernel",
        config=config,
        source="model",
        reason="expected 3.1x faster (20 us sparse, 62 us dense)",
        expected_us=us,
        dense_us=90.0 * (number + 1),
        bytes_dense=weight.nbytes,
        bytes_packed=int(6 * np.count_nonzero(weight)),
        error_share=0.02,
        history=((0, 2 * us), (5, us)),
        candidates=(Tried(weight_format, "a_kernel", config, us), Tried("dense", "b", {}, 90.0)),
        refusals={"n_of_m": "groups of 4 hold up to 4 nonzeros"},
        bound_by="multiply-adds",
        operations=2.0 * 128 * np.count_nonzero(weight),
        bytes_moved=5e5,
        spy=spy(weight, 4096),
        packed_spy=packed_spy(weight, order, 4096) if order else None,
    )


FORMATS_IN_TURN = ("register_tiled", "sliced_ell", "gathered_panels", "dense")
REPORT = Report(
    "bert.onnx",
    target="znver5",
    threads=2,
    layers=tuple(
        layer(n, f"/bert/encoder/layer.{n // 4}/attention/dense.{n}/MatMul", 0.95 - 0.1 * n, kind)
        for n, kind in enumerate(FORMATS_IN_TURN * 2)
    ),
    notes=("the batch is symbolic: plans are for 128 tokens",),
    totals={"compile_seconds": 12.5},
    ceilings=Ceilings(256.0, 38.0),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    named = os.environ.get("TVM_SPARSE_BROWSER")
    found = [named] if named else [path for name in BROWSERS if (path := shutil.which(name))]
    with playwright.sync_playwright() as session:
        try:
            # Without a path, the one that playwright itself has downloaded.
            opened = session.chromium.launch(executable_path=found[0] if found else None)
        except playwright.Error as error:
            reason = str(error).strip().splitlines()[0]
            pytest.skip(f"no browser can be started, see TVM_SPARSE_BROWSER: {reason}")
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a report; afterwards, assert that it complained of nothing and asked for nothing."""
    contexts, complaints, requests = [], [], []
    path = tmp_path / "report.html"

    def open_page(
        report: Report = REPORT, size: str = "desktop", scheme: str = "light", scripts: bool = True
    ) -> Any:
        report.to_html(path)
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append("a dialog"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints
    assert {url.split("#")[0] for url in requests if not url.startswith("data:")} == {path.as_uri()}


def keep_screenshot(page: Any, name: str, tmp_path: Path) -> Path:
    folder = Path(os.environ.get("TVM_SPARSE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    return folder / f"{name}.png"


def contrast(page: Any, selector: str) -> float:
    """The contrast of a text to what is behind it (WCAG 2.2)."""
    return page.evaluate(
        """selector => {
          const light = (colour) => {
            const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
            const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = parts.map(linear);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const element = document.querySelector(selector);
          const style = getComputedStyle(element);
          const ink = element.closest("svg") ? style.fill : style.color;
          let behind = element;
          const paper = () => getComputedStyle(behind).backgroundColor;
          while (/, 0\\)|transparent/.test(paper())) behind = behind.parentElement;
          const [dark, bright] = [light(ink), light(paper())].sort((a, b) => a - b);
          return (bright + 0.05) / (dark + 0.05);
        }""",
        selector,
    )


# ---------------------------------------------------------------------------------------------
# How it looks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_a_page_fits_its_window(
    visit: Callable[..., Any], size: str, scheme: str, tmp_path: Path
) -> None:
    page = visit(size=size, scheme=scheme)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == SIZES[size][0], "the page scrolls sideways"
    assert keep_screenshot(page, f"report-{size}-{scheme}", tmp_path).stat().st_size > 10_000


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_can_be_read(visit: Callable[..., Any], scheme: str) -> None:
    page = visit(scheme=scheme)
    for selector in (
        "h1", "h3", "section > p", "dt", "dd", ".notes li", ".rest, .bars small", "thead button",
        "tbody td", "tbody th a", ".weight > p", "figcaption", "tr.refused td", "tr.chosen td",
        "text.label", "text.value", "select",
    ):  # fmt: skip
        assert contrast(page, selector) >= 4.5, selector


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_paper_is_light_or_dark_as_the_reader_wants_it(
    visit: Callable[..., Any], scheme: str
) -> None:
    paper = visit(scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
    mean = np.mean([int(part) for part in paper.removeprefix("rgb(").removesuffix(")").split(",")])
    assert mean > 200 if scheme == "light" else mean < 60


def test_a_wide_table_scrolls_inside_its_frame(visit: Callable[..., Any]) -> None:
    page = visit(size="phone")
    inner, outer = page.evaluate(
        "(box => [box.scrollWidth, box.clientWidth])(document.querySelector('.scroll'))"
    )
    assert inner > outer


# ---------------------------------------------------------------------------------------------
# What it does
# ---------------------------------------------------------------------------------------------


def shown(page: Any, selector: str) -> list[str]:
    return [found.inner_text() for found in page.locator(selector).all() if found.is_visible()]


def pictures(page: Any) -> list[str]:
    images = [image for image in page.locator(".pictures img").all() if image.is_visible()]
    assert all(image.evaluate("image => image.naturalWidth > 0") for image in images)
    return [image.get_attribute("src") for image in images]


def test_picking_a_weight_changes_the_pictures(visit: Callable[..., Any]) -> None:
    page = visit()
    seen = []
    for wanted in REPORT.layers:
        page.get_by_label("Weight").select_option(label=wanted.name)
        assert shown(page, "details.weight h3") == [wanted.name]
        seen.append(tuple(pictures(page)))
        assert len(seen[-1]) == 1 + (wanted.packed_spy is not None)
    assert len(set(seen)) == len(REPORT.layers)


def test_a_picture_shows_where_the_nonzeros_are(visit: Callable[..., Any]) -> None:
    """Read back from the browser's own canvas: ink where there are nonzeros, else none."""
    page = visit()
    first = REPORT.layers[0]
    page.get_by_label("Weight").select_option(label=first.name)
    opacity = page.evaluate(
        """() => {
          const images = [...document.querySelectorAll(".pictures img")];
          const image = images.find((each) => each.checkVisibility());
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
          return [...data].filter((_, index) => index % 4 === 3);
        }"""
    )
    assert first.spy is not None
    assert [round(value / 17) for value in opacity] == list(first.spy.levels())


def test_a_name_in_the_table_leads_to_its_weight(visit: Callable[..., Any]) -> None:
    page = visit()
    name = REPORT.layers[5].name
    page.locator("#layers").get_by_role("link", name=name).click()
    assert shown(page, "details.weight h3") == [name]
    assert page.get_by_label("Weight").input_value() == "weight-5"


def test_words_find_layers(visit: Callable[..., Any]) -> None:
    page = visit()
    page.get_by_label("Search").fill("LAYER.1 sliced")
    assert shown(page, "#layers tbody th") == [REPORT.layers[5].name]
    assert shown(page, "#found") == ["1 of 8"]
    page.get_by_label("Search").fill("")
    assert len(shown(page, "#layers tbody th")) == 8


@pytest.mark.parametrize(
    ("title", "value"),
    [("dense us", "dense_us"), ("expected us", "expected_us"), ("dense size", "bytes_dense")],
)
def test_columns_are_sorted_by_their_numbers(
    visit: Callable[..., Any], title: str, value: str
) -> None:
    page = visit()
    names = [entry.name for entry in sorted(REPORT.layers, key=lambda entry: getattr(entry, value))]
    button = page.locator("#layers thead").get_by_role("button", name=title)
    button.click()
    assert shown(page, "#layers tbody th") == names
    assert page.locator("[aria-sort=ascending]").count() == 1
    button.click()
    assert shown(page, "#layers tbody th") == names[::-1]
    assert page.locator("[aria-sort=descending]").inner_text().startswith(title)


def test_what_is_not_known_is_sorted_last_either_way(visit: Callable[..., Any]) -> None:
    page = visit()
    # Only sparse layers are faster.
    button = page.locator("#layers thead").get_by_role("button", name="faster")
    for _ in range(2):
        button.click()
        last = shown(page, "#layers tbody th")[-2:]
        assert set(last) == {REPORT.layers[3].name, REPORT.layers[7].name}


def test_without_scripts_everything_is_there(visit: Callable[..., Any]) -> None:
    page = visit(scripts=False)
    assert len(shown(page, "#layers tbody tr")) == 8
    assert len(shown(page, "details.weight h3")) == 8
    assert not shown(page, ".tools")
    assert shown(page, "details[open] figcaption")


# ---------------------------------------------------------------------------------------------
# Whatever it holds
# ---------------------------------------------------------------------------------------------


def test_a_name_that_is_a_script_does_nothing(visit: Callable[..., Any]) -> None:
    from dataclasses import replace

    hurtful = replace(
        REPORT.layers[0], name=NASTY, reason=NASTY, kernel=NASTY, refusals={NASTY: NASTY}
    )
    page = visit(replace(REPORT, source=NASTY, layers=(hurtful,), notes=(NASTY,)))
    assert page.evaluate("window.hurt") is None
    assert shown(page, "details.weight h3") == [NASTY]


def test_a_page_without_layers_opens(visit: Callable[..., Any]) -> None:
    assert "no layers" in visit(Report("empty.onnx")).locator("main").inner_text()


def test_a_script_that_is_not_the_page_s_own_is_not_run(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page_text = REPORT.to_html().replace("</main>", "</main><script>window.hurt = 1</script>")
    path.write_text(page_text, encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.hurt") is None
    # Its own one ran.
    assert page.get_by_label("Weight").is_visible()
    page.close()
