"""The benchmark times what is right, names what is not, and compares within one run only."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tvm_sparse import bench as module
from tvm_sparse import zoo
from tvm_sparse.bench import (
    BUILDERS,
    PEERS,
    BenchCase,
    BenchResult,
    SystemTime,
    bench,
    interleave,
    pinned,
    relative_error,
)
from tvm_sparse.errors import InputError, ModelError, SparseError
from tvm_sparse.files import save_onnx

CASE = BenchCase(
    name="net @ 90%",
    threads=1,
    zeros=0.9,
    inputs={"x": (1, 2)},
    cores=(0,),
    reference="onnxruntime",
    rounds=9,
    systems=(
        SystemTime("tvm_sparse", 2.0, 1.9, 2.1, error=1e-6, build_seconds=3.0),
        SystemTime("onnxruntime", 9.0, 8.9, 9.1, error=0.0),
        SystemTime("openvino f32", 8.0, 7.9, 8.1, error=1e-6),
        SystemTime("openvino default", 1.0, 0.9, 1.1, error=1e-2),
        SystemTime("tvm dense", failure="its output is wrong"),
    ),
)
RESULT = BenchResult("a processor", "Linux", {"onnxruntime": "1.2"}, "2026-01-01T00:00", (CASE,))


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a system is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def system(self, name: str, *seconds: float):
        """Return a system that takes `seconds` in turn, the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_each_round_calls_every_system_once_in_rotating_order():
    clock = Clock()
    systems = {name: clock.system(name, 0.1) for name in "abc"}
    times = interleave(systems, repeats=4, clock=clock)
    assert {name: len(samples) for name, samples in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(clock.calls[-12:]) == "abcbcacababc"


def test_the_first_slow_calls_are_not_measured():
    clock = Clock()
    systems = {"a": clock.system("a", 50.0, 1.0), "b": clock.system("b", 2.0)}
    times = interleave(systems, repeats=3, clock=clock)
    assert times["a"] == pytest.approx([1.0, 1.0, 1.0])
    assert times["b"] == pytest.approx([2.0, 2.0, 2.0])


def test_short_calls_are_repeated_until_the_clock_can_tell():
    clock = Clock()
    times = interleave({"a": clock.system("a", 1e-5)}, repeats=2, clock=clock)
    assert times["a"] == pytest.approx([1e-5, 1e-5])
    assert len(clock.calls) >= 2 * 100


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 5), (10.0, 50), (1e9, 300)])
def test_rounds_follow_the_time_that_is_given(seconds, rounds):
    clock = Clock()
    systems = {"a": clock.system("a", 0.125), "b": clock.system("b", 0.075)}
    assert len(interleave(systems, seconds=seconds, clock=clock)["a"]) == pytest.approx(
        rounds, abs=1
    )


def test_nothing_to_time_is_no_error():
    assert interleave({}) == {}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
def test_pinning_holds_inside_and_is_undone_outside():
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyError), pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores)
        assert len(cores) == 1
        raise KeyError
    assert os.sched_getaffinity(0) == before


# ---------------------------------------------------------------------------------------------
# Right and wrong
# ---------------------------------------------------------------------------------------------


def test_errors_are_relative_to_the_largest_output():
    want = [np.array([1.0, -200.0])]
    assert relative_error([np.array([1.0, -200.0])], want) == 0
    assert relative_error([np.array([2.0, -200.0])], want) == pytest.approx(1 / 200)
    assert relative_error([np.zeros(0)], [np.zeros(0)]) == 0
    assert relative_error([np.array([1e-3])], [np.array([0.0])]) == pytest.approx(1e-3)


def test_non_finite_values_have_to_coincide():
    want = [np.array([np.nan, np.inf, 1.0])]
    assert relative_error(want, want) == 0
    assert math.isnan(relative_error([np.array([0.0, np.inf, 1.0])], want))
    assert math.isnan(relative_error([np.array([np.nan, -np.inf, 1.0])], want))
    assert math.isnan(relative_error([np.array([np.nan, np.inf, np.nan])], want))


def test_other_shapes_and_counts_are_wrong():
    assert math.isnan(relative_error([np.zeros((2, 1))], [np.zeros((1, 2))]))
    assert math.isnan(relative_error([], [np.zeros(1)]))


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "model.onnx"
    save_onnx(zoo.single_matmul(8, 16, 4), path)
    return module._Job(
        model=str(path),
        name="net",
        against=["onnxruntime"],
        threads=1,
        target="native",
        plan=None,
        records=None,
        library=None,
        shapes={},
        repeats=3,
        seconds=1.0,
        result="",
    )


def with_ours(monkeypatch, builder) -> None:
    monkeypatch.setattr(module, "BUILDERS", {**BUILDERS, "tvm_sparse": builder})


def test_a_wrong_output_is_a_failure_without_a_time(job, monkeypatch):
    pytest.importorskip("onnxruntime")
    with_ours(monkeypatch, lambda job, feed: lambda: [np.zeros((4, 8), np.float32)])
    case = module._measure(job, lambda text: None)
    ours, peer = case.system("tvm_sparse"), case.system("onnxruntime")
    assert ours.median_ms is None
    assert "its output is wrong (error 1 " in ours.failure
    assert peer.median_ms > 0 and peer.error == 0
    assert case.speedup is None


def test_a_system_that_breaks_does_not_stop_the_others(job, monkeypatch):
    pytest.importorskip("onnxruntime")

    def broken(job, feed):
        raise ModelError("the operator Foo is not known.")

    with_ours(monkeypatch, broken)
    case = module._measure(job, lambda text: None)
    assert case.system("tvm_sparse").failure == "the operator Foo is not known"
    assert case.system("onnxruntime").median_ms > 0
    assert replace(RESULT, cases=(case,)).failed


def test_a_right_output_is_timed_on_the_same_input(job, monkeypatch):
    pytest.importorskip("onnxruntime")
    with_ours(monkeypatch, BUILDERS["onnxruntime"])
    case = module._measure(job, lambda text: None)
    assert case.rounds == 3
    assert case.speedup is not None
    ours = case.system("tvm_sparse")
    assert ours.low_ms <= ours.median_ms <= ours.high_ms
    assert case.zeros == 0 and case.inputs == {"input": (4, 16)}


def test_a_peer_that_is_not_installed_is_said(job, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(module, "REQUIRES", {**module.REQUIRES, "openvino f32": "no_such_package"})
    with_ours(monkeypatch, BUILDERS["onnxruntime"])
    case = module._measure(replace(job, against=["openvino"]), lambda text: None)
    assert case.system("openvino f32").failure == "no_such_package is not installed"


def test_openvino_is_shown_in_float32_and_in_its_default_precision(job):
    pytest.importorskip("openvino")
    feed = module._random_feed(job)
    _, wanted = module._reference(job, feed)
    for name in PEERS["openvino"]:
        time, call = module._try_system(name, job, feed, wanted)
        assert call is not None, time.failure
        assert time.error < 0.05


# ---------------------------------------------------------------------------------------------
# Input
# ---------------------------------------------------------------------------------------------


def test_symbolic_inputs_need_a_shape(job):
    save_onnx(zoo.mlp(batch="N", sizes=(16, 8)), job.model)
    with pytest.raises(InputError, match="symbolic dimension 'N'; give its shape: --shape input=N"):
        module._random_feed(job)
    feed = module._random_feed(replace(job, shapes={"input": [5, 16]}))
    assert feed.arrays["input"].shape == (5, 16)
    with pytest.raises(InputError, match="the shape given is"):
        module._random_feed(replace(job, shapes={"input": [5, 17]}))
    with pytest.raises(InputError, match="no input 'x'; its inputs are input"):
        module._random_feed(replace(job, shapes={"x": [5, 16]}))


def test_a_call_that_makes_no_sense_is_refused_in_words(tmp_path):
    model = zoo.single_matmul(8, 8, 4)
    with pytest.raises(SparseError, match="unknown peer 'torch'; there are onnxruntime"):
        bench(model, ["torch"])
    with pytest.raises(SparseError, match="10000 threads were asked for"):
        bench(model, threads=10000)
    with pytest.raises(SparseError, match="one round or more"):
        bench(model, repeats=0)
    with pytest.raises(SparseError, match="has its zeros already"):
        bench(model, library="m.so", sparsities=[0.9])
    with pytest.raises(ModelError, match="there is no file"):
        bench(tmp_path / "none.onnx")


def test_a_whole_bench_runs_in_a_process_of_its_own():
    pytest.importorskip("onnxruntime")
    before = dict(os.environ)
    found = bench(
        zoo.mlp(sizes=(32, 16, 8)), ["onnxruntime"], sparsities=[0.5, 0.75], repeats=3, name="mlp"
    )
    assert [case.zeros for case in found.cases] == [0.5, 0.75]
    assert all(case.system("onnxruntime").median_ms > 0 for case in found.cases)
    assert all(case.name == "mlp" and case.threads == 1 for case in found.cases)
    assert found.versions["onnxruntime"] and found.cpu
    assert dict(os.environ) == before


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def test_results_survive_json(tmp_path):
    path = tmp_path / "result.json"
    RESULT.to_json(path)
    assert BenchResult.from_json(path.read_text()) == RESULT
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 99}'])
def test_something_else_is_no_result(text):
    with pytest.raises(SparseError, match="benchmark result"):
        BenchResult.from_json(text)


def test_the_speed_up_is_against_the_better_float32_peer_only():
    assert CASE.speedup == 4.0
    assert replace(CASE, systems=CASE.systems[:1]).speedup is None


def test_the_tables_say_what_failed_and_on_what_they_were_measured():
    for text in (RESULT.table(), RESULT.markdown()):
        assert "4.00x" in text and "90%" in text
        assert "tvm dense: its output is wrong" in text
        assert "1 thread, a processor, 2026-01-01; onnxruntime 1.2" in text
    head, rule, row = RESULT.markdown().splitlines()[:3]
    assert head.count("|") == rule.count("|") == row.count("|")


# ---------------------------------------------------------------------------------------------
# The tables of networks
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "networks.py"
    spec = importlib.util.spec_from_file_location("networks", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_only_the_place_between_the_marks_is_rewritten(script):
    text = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    once = script.rewritten(text, "new")
    assert once == f"before\n{script.BEGIN}\n\nnew\n\n{script.END}\nafter\n"
    assert script.rewritten(once, "new") == once
    with pytest.raises(SparseError, match="lacks the marks"):
        script.rewritten("no marks", "new")


def test_the_first_convolution_and_depthwise_ones_stay_unpruned(script):
    names = script.unpruned(zoo.mobilenet_v1(size=32))
    assert names[0] == "stem"
    assert names[1:] == [f"block{index}/depthwise" for index in range(1, 14)]
    assert script.unpruned(zoo.single_matmul(8, 8, 4)) == []


def test_a_stopped_run_goes_on_where_it_was(script, tmp_path, monkeypatch):
    asked = []

    def fake(model, against, threads, *, name, sparsities, **options):
        asked.append(name)
        case = replace(CASE, name=name, zeros=sparsities[0])
        return replace(RESULT, cases=(case,))

    monkeypatch.setattr(script, "bench", fake)
    path = tmp_path / "results.json"
    script.measure(script.QUICK[:1], path, [1])
    assert len(asked) == 1
    result = script.measure(script.QUICK, path, [1])
    assert asked[1:] == ["layer 96x96 @ 80%", "layer 96x96 @ 90%"]
    assert len(result.cases) == 3
    script.measure(script.QUICK, path, [1])
    assert len(asked) == 3
    script.measure(script.QUICK, path, [1], again=True)
    assert len(asked) == 6


def test_results_of_another_machine_are_measured_again(script, tmp_path, monkeypatch):
    machines = iter(["one", "two", "two", "two"])

    def fake(model, against, threads, *, name, **options):
        return replace(RESULT, cpu=next(machines), cases=(replace(CASE, name=name),))

    monkeypatch.setattr(script, "bench", fake)
    path = tmp_path / "results.json"
    script.measure(script.QUICK[:1], path, [1])
    networks = (script.QUICK[0], replace(script.QUICK[1], sparsities=(0.8,)))
    script.measure(networks, path, [1])
    data = json.loads(path.read_text())
    assert data["cpu"] == "two"
    assert len(data["cases"]) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_networks_in_half_precision_are_compared_with_what_their_type_allows(tmp_path, dtype):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "half.onnx"
    save_onnx(zoo.single_matmul(32, 48, 8, dtype=dtype), path)
    result = module.bench(path, ("onnxruntime", "tvm"), 1, repeats=3)
    [case] = result.cases
    ours = next(system for system in case.systems if system.name == "tvm_sparse")
    assert not ours.failure
    assert 1e-6 < ours.error < 5e-2
    assert case.reference == {"float16": "onnxruntime", "bfloat16": "NumPy"}[dtype]
