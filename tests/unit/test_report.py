"""Reports: layers in the user's words, refusals with their reasons, JSON that comes back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tvm_sparse.errors import SparseError
from tvm_sparse.findings import Finding
from tvm_sparse.report import Ceilings, LayerReport, Report, Tried, format_bytes
from tvm_sparse.spy import Spy

SPARSE = LayerReport(
    name="encoder.layer.0.intermediate.dense",
    op="matmul",
    shape=(3072, 768),
    dtype="float32",
    density=0.1,
    pattern="unstructured",
    nnz=235930,
    format="tiled",
    kernel="spmm",
    config={"mr": 4, "nt": 4},
    source="record",
    reason="fastest of 12",
    expected_us=98.25,
    dense_us=604.0,
    bytes_dense=9437184,
    bytes_packed=1300000,
    error=1e-6,
    error_share=0.01,
)
DENSE = replace(
    SPARSE,
    name="classifier",
    shape=(2, 768),
    density=0.9,
    nnz=1382,
    format="dense",
    kernel=None,
    config=None,
    source="cost model",
    reason="90 % of it is nonzero, and the dense kernel is faster",
    bytes_dense=6144,
    bytes_packed=6144,
)
FOUND = LayerReport(
    name="conv1", op="conv2d", shape=(64, 3, 7, 7), density=0.25, pattern="2:4", nnz=2352
)


NEARLY = replace(
    FOUND,
    pattern="nearly 2:4",
    findings=(Finding("2:4", 12, 0.95, 0.93, -math.inf, along="channels"),),
)


SPY = Spy.of(2, 3, 0.5, bytes([0, 1, 2, 3, 4, 15]))
DETAILED = replace(
    SPARSE,
    candidates=(Tried("tiled", "spmm", {"mr": 4}, 98.25, True), Tried("dense", "gemm", {}, 604.0)),
    refusals={"n_of_m": "only for matrix products"},
    bound_by="multiply-adds",
    operations=6e7,
    bytes_moved=2.5e6,
    spy=SPY,
    packed_spy=Spy.of(1, 2, 1.0, bytes([15, 0])),
    packed_with=("encoder.layer.0.output.dense",),
)


def report(*layers: LayerReport, **more: object) -> Report:
    return Report(source="bert.onnx", target="x86-64-v4", threads=1, layers=layers, **more)  # type: ignore[arg-type]


def test_the_table_names_layers_and_shows_what_became_of_them() -> None:
    text = report(SPARSE, DENSE).render(400)
    line = next(row for row in text.splitlines() if row.startswith(SPARSE.name))
    for word in (
        "matmul",
        "3072x768",
        "10.0 %",
        "235,930",
        "tiled",
        "98.2",
        "604.0",
        "9.0 MiB",
    ):
        assert word in line
    assert text.splitlines()[0] == "bert.onnx for x86-64-v4 on 1 thread"


def test_the_totals_count_layers_and_bytes() -> None:
    text = report(SPARSE, DENSE, totals={"compile_seconds": 41.25}).render(400)
    assert "2 layers with weights; 1 sparse, 1 dense; 10.1 % of the weights are nonzero" in text
    assert "9.0 MiB dense, 1.2 MiB packed" in text
    assert "compile seconds: 41.25" in text


def test_an_inspection_shows_profile_columns_only() -> None:
    text = Report(source="m.onnx", layers=(FOUND,)).render(200)
    header = text.splitlines()[2].split()
    assert header == ["layer", "op", "shape", "nonzero", "nnz", "pattern"]
    assert "sparse" not in text
    assert text.splitlines()[0] == "m.onnx"


def test_a_form_that_nearly_holds_is_shown_with_the_nonzeros_outside_it() -> None:
    text = Report(source="m.onnx", layers=(NEARLY, FOUND)).render(200)
    row = next(line for line in text.splitlines() if "nearly 2:4" in line)
    assert row.split()[-2:] == ["%", "12"] and "95.0 %" in row
    assert "explains" in text and "outside" in text


def test_forms_come_back_from_json() -> None:
    text = Report(source="m.onnx", layers=(NEARLY, FOUND)).to_json()
    assert Report.from_json(text).layers == (NEARLY, FOUND)
    first, second = json.loads(text)["layers"]
    assert first["findings"][0]["form"] == "2:4" and "findings" not in second
    first["findings"][0]["of a later version"] = 1
    data = {**json.loads(text), "layers": [first]}
    assert Report.from_json(json.dumps(data)).layers == (NEARLY,)


def test_the_type_is_shown_only_where_it_is_not_float32() -> None:
    assert "dtype" not in report(SPARSE).render(400)
    assert "float64" in report(SPARSE, replace(DENSE, dtype="float64")).render(400)


def test_refusals_are_grouped_by_reason_and_name_their_layers() -> None:
    others = [replace(DENSE, name=f"fc{index}", reason="too small") for index in range(9)]
    text = report(SPARSE, DENSE, *others).render(400)
    tail = text.split("not made sparse:")[1]
    assert f"{DENSE.reason}: classifier" in tail
    assert tail.count("too small") == 1
    assert "fc0, fc1, fc2, fc3, fc4, fc5 and 3 more" in tail
    assert SPARSE.reason is not None and SPARSE.reason not in tail


def test_notes_are_printed() -> None:
    assert "note: batch is symbolic" in report(SPARSE, notes=("batch is symbolic",)).render(100)


@pytest.mark.parametrize("width", [80, 100, 130, 180])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    layers = [replace(layer, name=layer.name * 4) for layer in (SPARSE, DENSE)]
    text = report(*layers, notes=("a long note " * 30,)).render(width)
    assert max(map(len, text.splitlines())) <= width


def test_columns_that_a_narrow_terminal_lacks_are_named() -> None:
    assert "too narrow to show nnz" in report(SPARSE, DENSE).render(100)
    assert "too narrow" not in report(SPARSE, DENSE).render(200)


def test_a_long_name_is_wrapped_and_not_cut() -> None:
    name = "x" * 50 + "y" * 50
    text = report(replace(FOUND, name=name)).render(70)
    assert text.count("x") - text.count("x", 0, text.index("---")) >= 50
    assert text.count("y") >= 50


def test_numbers_are_right_aligned() -> None:
    lines = report(SPARSE, DENSE).render(400).splitlines()
    first, second = (
        next(row for row in lines if row.startswith(layer.name)) for layer in (SPARSE, DENSE)
    )
    header = next(row for row in lines if "nnz" in row)
    end = header.index("nnz") + 3
    assert first[:end].endswith("235,930") and second[:end].endswith("1,382")


def test_a_model_without_weights_has_a_report_too() -> None:
    assert "0 layers with weights" in str(report())


@pytest.mark.parametrize(
    "example",
    [
        report(),
        report(
            SPARSE, DENSE, FOUND, notes=("one", "two"), totals={"model_us": 12.5, "machine": "box"}
        ),
        Report(source="m.onnx", layers=(FOUND,)),
        report(replace(SPARSE, error=math.inf, measured_us=-math.inf)),
        report(replace(SPARSE, history=((0, 12.5), (2, 12.5), (3, 9.0))), DENSE),
        report(replace(SPARSE, history=((0, math.inf), (1, 2.0)))),
        report(DETAILED, ceilings=Ceilings(256.0, 38.5)),
        report(ceilings=Ceilings(6e4, 3350.0, 9e5)),
        report(replace(DETAILED, operations=math.inf)),
    ],
)
def test_json_comes_back_as_the_same_report(example: Report) -> None:
    assert Report.from_json(example.to_json()) == example


def test_json_is_strict_and_has_a_version_and_a_summary() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(report(replace(SPARSE, error=math.nan)).to_json(), parse_constant=refuse)
    assert data["version"] == 1
    assert data["summary"]["sparse"] == 1
    assert data["layers"][0]["error"] == "nan"


def test_numpy_numbers_become_json_numbers() -> None:
    layer = replace(FOUND, nnz=np.int64(5), density=np.float32(0.25), config={"mr": np.int32(4)})
    data = json.loads(report(layer).to_json())
    assert data["layers"][0]["nnz"] == 5
    assert data["layers"][0]["config"] == {"mr": 4}


def test_a_layer_that_was_not_tuned_carries_no_history() -> None:
    tuned = replace(SPARSE, history=((0, 12.5),))
    layers = json.loads(report(tuned, DENSE).to_json())["layers"]
    assert layers[0]["history"] == [[0, 12.5]]
    assert "history" not in layers[1]


def test_the_history_does_not_change_the_table() -> None:
    assert str(report(replace(SPARSE, history=((0, 12.5),)))) == str(report(SPARSE))


def test_a_report_is_the_same_without_its_pictures() -> None:
    bare = report(DETAILED, FOUND).without_pictures()
    assert bare == report(replace(DETAILED, spy=None, packed_spy=None), FOUND)
    assert "cells" not in bare.to_json()


def test_a_report_of_a_first_version_has_no_details() -> None:
    data = json.loads(report(FOUND).to_json())
    del data["ceilings"], data["layers"][0]["bound_by"]
    assert Report.from_json(json.dumps(data)) == report(FOUND)


@pytest.mark.parametrize("picture", ["no picture", {"height": 2}, {**asdict(SPY), "height": 9}])
def test_a_report_with_a_broken_picture_is_refused_in_words(picture: object) -> None:
    data = json.loads(report(DETAILED).to_json())
    data["layers"][0]["spy"] = picture
    with pytest.raises(SparseError, match="not a whole report"):
        Report.from_json(json.dumps(data))


def test_fields_of_a_later_writer_are_ignored() -> None:
    data = json.loads(report(FOUND).to_json())
    data["layers"][0]["colour"] = "green"
    data["colour"] = "green"
    assert Report.from_json(json.dumps(data)) == report(FOUND)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "no version"),
        ("{}", "no version"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1}', "not a whole report"),
        ('{"version": 1, "source": "", "target": "", "threads": 1, "layers": [1]}', "not a whole"),
    ],
)
def test_what_is_no_report_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(SparseError, match=words):
        Report.from_json(text)


def test_the_file_holds_the_same_text_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    assert report(SPARSE).to_json(path) == path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SparseError, match="cannot be written"):
        report(SPARSE).to_json(tmp_path / "missing" / "report.json")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_sizes_carry_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("density", "text"),
    [(0.0, " 0.0 %"), (1e-6, "<0.1 %"), (0.1, "10.0 %"), (0.9999, ">99.9 %"), (1.0, "100.0 %")],
)
def test_hardly_any_does_not_read_as_none(density: float, text: str) -> None:
    assert f" {text.strip()} " in report(replace(FOUND, density=density)).render(200)
