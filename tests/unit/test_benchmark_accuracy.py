"""The benchmark of accuracy: what is trained again, and what its page says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from benchmark_support import importable_benchmarks  # noqa: F401


def case(form: str, zeros: float, ours: float, **more) -> dict:
    found = {
        "name": form,
        "form": form,
        "zeros": zeros,
        "ms": {"tvm_sparse": ours, "onnxruntime": 3.0, "openvino f32": 2.0},
        "accuracy": 0.99,
        "distorted": 0.9,
        "images": 40,
        "different": [],
        "bytes_packed": 4096,
    }
    return {**found, **more}


CASES = [
    case("dense", 0.0, 2.0),
    case("2:4, 50 %", 0.5, 1.0, distorted=0.912, accuracy=0.97, bytes_packed=3072, different=[7]),
]
SECTION = {
    "environment": {
        "cpu": "a processor",
        "batch": 32,
        "held out": 10,
        "distorted": 30,
        "date": "2026-01-02T03:04:05",
        "versions": {"onnxruntime": "1"},
    },
    "cases": CASES,
}


def test_speeds_are_over_the_better_dense_library():
    from accuracy import speed

    assert [speed(found) for found in CASES] == [1.0, 2.0]


def test_the_table_holds_what_a_form_changes_over_dense():
    from accuracy import table

    assert list(table(CASES))[2:] == [
        "| dense | 2.00 | 1.0x | 4 KiB | 1.00 | 99.0% | +0.0 | 90.0% | +0.0 |",
        "| 2:4, 50 % | 1.00 | 2.0x | 3 KiB | 0.75 | 97.0% | -2.0 | 91.2% | +1.2 |",
    ]


def test_answers_that_differ_from_onnx_runtimes_are_not_hidden():
    from accuracy import tables

    head, _ = tables({"convnet": SECTION})
    assert "on 79 of 80 the answers are ONNX Runtime's" in head


def test_the_figure_draws_every_form_of_both_networks(tmp_path):
    pytest.importorskip("matplotlib")
    from accuracy import speed
    from plot_accuracy import draw

    file = tmp_path / "images" / "digits.svg"
    draw({"convnet": CASES, "transformer": CASES}, speed, file)
    text = file.read_text()
    assert all(word in text for word in ("convnet", "transformer", "2:4", "dense"))
    draw({"convnet": CASES, "transformer": CASES}, speed, file)
    assert file.read_text() == text


@dataclass(frozen=True)
class Outcome:
    form: str


def test_only_what_is_missing_is_trained(tmp_path, monkeypatch):
    import accuracy

    asked = []

    def outcomes(network, forms, *_):
        asked.append((network, [form.name for form in forms]))
        yield from (Outcome(form.name) for form in forms)

    forms = [SimpleNamespace(name="dense"), SimpleNamespace(name="2:4, 50 %")]
    steps = SimpleNamespace(
        FULL=SimpleNamespace(variants=1),
        FORMS=forms,
        NETWORKS=("convnet", "transformer"),
        forms_of=lambda network, forms: forms,
        load_images=lambda variants: None,
        outcomes=outcomes,
        row=str,
    )
    monkeypatch.setattr(accuracy, "tutorial", lambda: steps)
    accuracy.train(tmp_path / "digits", "convnet: dense")
    accuracy.train(tmp_path / "digits", "")
    assert asked == [
        ("convnet", ["dense"]),
        ("convnet", ["2:4, 50 %"]),
        ("transformer", ["dense", "2:4, 50 %"]),
    ]
    names = [case["name"] for case in json.loads((tmp_path / "digits/digits.json").read_text())]
    assert len(names) == 4 and "transformer: 2:4, 50 %" in names
