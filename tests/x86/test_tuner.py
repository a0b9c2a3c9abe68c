"""Tuning: what goes wrong costs one candidate, nothing measured is lost, and plans use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tuning_support import misbehaving_worker, small_job, small_model
from tvm_sparse.schedules.lookup import DENSE_FORMATS, template_named
from tvm_sparse.schedules.x86.metaschedule import METASCHEDULE
from tvm_sparse.schedules.x86.templates import TEMPLATES

import tvm_sparse as ts
from tvm_sparse import tuner, zoo
from tvm_sparse.cpu_features import machine_identity
from tvm_sparse.errors import RecordError, TuningError
from tvm_sparse.records import RecordFile, read_records
from tvm_sparse.tuning.measurer import Candidate, Measurer, job_folder

SLICED = {"nt": 1, "kb": 64, "multiple": 48, "threads": 1, "parts": 1, "share": 1}


def sliced(mr: int) -> Candidate:
    return Candidate("sliced_rows", {**SLICED, "mr": mr})


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def test_a_candidate_that_crashes_hangs_or_is_wrong_costs_only_itself(tmp_path: Path) -> None:
    worker = misbehaving_worker(tmp_path, crash=2, hang=3, wrong=4)
    with job_folder(small_job()) as folder, Measurer(1, timeout=20, program=worker) as measurer:
        outcomes = dict(measurer.measure(folder, [sliced(mr) for mr in (1, 2, 4, 6)]))
        measurer.timeout = 2
        outcomes |= {4: dict(measurer.measure(folder, [sliced(3)]))[0]}
        measurer.timeout = 20
        outcomes |= {5: dict(measurer.measure(folder, [sliced(8)]))[0]}
    assert [outcomes[i].status for i in range(6)] == [
        "ok", "crashed", "wrong", "ok", "timed out", "ok",
    ]  # fmt: skip
    assert all((outcomes[i].us or 0) > 0 for i in (0, 3, 5))
    assert "died" in outcomes[1].message
    assert "times what rounding explains" in outcomes[2].message
    assert "within 2 s" in outcomes[4].message


def test_a_configuration_that_cannot_be_built_fails_with_a_sentence() -> None:
    with job_folder(small_job()) as folder, Measurer(1) as measurer:
        bad = Candidate("sliced_rows", {**SLICED, "mr": 3, "share": 2})
        outcome = dict(measurer.measure(folder, [bad, sliced(4)]))
    assert outcome[0].status == "failed"
    assert "cannot share a column" in outcome[0].message
    assert outcome[1].status == "ok"


def test_finalists_run_against_each_other_on_one_machine() -> None:
    with job_folder(small_job()) as folder, Measurer(1) as measurer:
        finalists = [sliced(2), sliced(4), sliced(6)]
        outcomes = measurer.race(folder, finalists)
    assert outcomes is not None and len(outcomes) == 3
    assert all(o.samples >= 5 and (o.us or 0) > 0 for o in outcomes)


def test_the_folder_of_the_sources_does_not_hide_the_installed_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with job_folder(small_job()) as folder, Measurer(1) as measurer:
        assert dict(measurer.measure(folder, [sliced(4)]))[0].status == "ok"


def test_a_worker_that_cannot_start_is_no_candidates_fault(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('there is no room for me')\n")
    program = [sys.executable, str(script)]
    with (
        job_folder(small_job()) as folder,
        Measurer(1, program=program) as measurer,
        pytest.raises(TuningError, match=r"does not start.*there is no room for me"),
    ):
        list(measurer.measure(folder, [sliced(4)]))


def test_a_tuned_model_is_planned_by_its_records(records: Path) -> None:
    model = small_model()
    found = ts.tune(model, trials=6, records=records, threads=1)
    assert len(found.tasks) == 1
    task = found.tasks[0]
    assert task.us is not None and task.untuned_us is not None and task.dense_us is not None
    kept = read_records(records)
    assert not kept.skipped
    formats = {template_named(r.kernel).format for r in kept.records}
    assert formats & DENSE_FORMATS and formats - DENSE_FORMATS
    assert {r.subject.machine for r in kept.records} == {machine_identity()}

    plan = ts.plan(model, records=records, threads=1)
    decision = plan.decisions[0]
    assert decision.source == "record"
    assert "measured" in decision.reason
    fastest = {}
    for record in kept.records:
        fastest[record.key] = record
    best = min((r for r in fastest.values() if r.ok), key=lambda r: r.us or 0)
    assert (decision.kernel, dict(decision.config)) == (best.kernel, dict(best.config))


def test_compiling_with_records_is_checked_and_reported(records: Path, tmp_path: Path) -> None:
    proto = ts.prune(zoo.mlp(sizes=(64, 48, 32)), sparsity=0.9, scope="layer")
    ts.tune(proto, trials=4, records=records, threads=1)
    module = ts.compile(proto, records=records, threads=1)
    assert {layer.source for layer in module.report.layers} == {"record"}
    assert all(layer.history for layer in module.report.layers)
    x = np.random.default_rng(0).standard_normal(module.inputs[0].shape, np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    want = session.run(None, {module.inputs[0].name: x})[0]
    np.testing.assert_allclose(module(x), want, rtol=0, atol=2e-5 * np.abs(want).max())
    page = tmp_path / "report.html"
    module.report.to_html(page)
    assert "<svg" in page.read_text()


def test_tuning_again_measures_nothing_twice(records: Path) -> None:
    model = small_model()
    first = ts.tune(model, trials=5, records=records, threads=1)
    lines = records.read_text().splitlines()
    again = ts.tune(model, trials=5, records=records, threads=1)
    assert records.read_text().splitlines() == lines
    assert again.tasks[0].reused == again.tasks[0].trials == first.tasks[0].trials
    more = ts.tune(model, trials=7, records=records, threads=1)
    assert more.tasks[0].trials == 7
    assert more.tasks[0].reused == 5


def test_another_weight_of_the_same_shape_takes_the_configuration_over(records: Path) -> None:
    ts.tune(small_model(), trials=4, records=records, threads=1)
    layer = zoo.single_matmul(64, 64, 32, seed=5)
    other = ts.load(ts.prune(layer, sparsity=0.9, scope="layer"))
    decision = ts.plan(other, records=records, threads=1).decisions[0]
    assert decision.source == "record"
    assert "as was fastest for 64x64x32 with 90 % zeros" in decision.reason


def test_convolutions_and_several_threads_are_tuned_too(records: Path) -> None:
    conv = zoo.single_conv(16, 24, 12)
    proto = ts.prune(conv, sparsity=0.8, scope="layer")
    found = ts.tune(proto, trials=5, records=records, threads=2)
    assert found.tasks[0].us is not None
    assert not found.tasks[0].failures
    module = ts.compile(proto, records=records, threads=2)
    assert module.report.layers[0].source == "record"


def test_layers_that_are_alike_share_their_measurements(records: Path) -> None:
    proto = zoo.bert_encoder(layers=2, hidden=64, heads=2, ffn=128, seq=16)
    proto = ts.prune(proto, sparsity=0.9, scope="layer")
    found = ts.tune(proto, trials=1, records=records, threads=1)
    layers = [name for task in found.tasks for name in task.layers]
    assert len(layers) == 12 > len(found.tasks)
    plan = ts.plan(proto, records=records, threads=1)
    assert {decision.source for decision in plan.decisions} == {"record"}


def test_what_stays_dense_is_tuned_by_metaschedule_and_built_from_its_record(
    records: Path,
) -> None:
    proto = zoo.single_matmul(48, 32, 24)
    found = ts.tune(proto, trials=2, dense_trials=6, records=records, threads=1)
    kept = read_records(records).records
    schedules = [r for r in kept if r.kernel == METASCHEDULE.name]
    assert 1 <= len(schedules) <= 6
    assert found.tasks[0].trials == 2 + len(schedules)
    assert any(r.ok for r in schedules)
    again = ts.tune(proto, trials=2, dense_trials=6, records=records, threads=1)
    assert again.tasks[0].reused >= found.tasks[0].trials

    # A plan by the schedule alone: the trace in the record is all that building needs.
    best = min((r for r in schedules if r.ok), key=lambda r: r.us or 0)
    module = ts.compile(proto, records=RecordFile((best,)), threads=1)
    assert module.report.layers[0].kernel == METASCHEDULE.name
    x = np.random.default_rng(0).standard_normal(module.inputs[0].shape, np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    want = session.run(None, {module.inputs[0].name: x})[0]
    np.testing.assert_allclose(module(x), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_a_kill_in_the_middle_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    path, records = tmp_path / "m.onnx", tmp_path / "records.jsonl"
    onnx.save_model(ts.prune(zoo.single_matmul(64, 64, 32), sparsity=0.9, scope="layer"), path)
    command = [
        sys.executable, "-m", "tvm_sparse", "tune", str(path), "--records", str(records),
        "--trials", "20", "--threads", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 100
        while time.monotonic() < end and process.poll() is None:
            if records.exists() and records.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = read_records(records)
    assert len(kept.records) >= 3
    assert len(kept.skipped) <= 1
    found = ts.tune(onnx.load(path), trials=20, records=records, threads=1)
    assert found.tasks[0].reused >= 3
    assert len({r.key for r in read_records(records).records}) == found.tasks[0].trials


def test_ctrl_c_ends_the_workers_and_keeps_the_records(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = tuner.append_records

    def stop_after_three(path: Path, new: list) -> None:
        append(path, new)
        if len(read_records(path).records) == 3:
            raise KeyboardInterrupt

    started: list[Measurer] = []

    class Watched(Measurer):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            started.append(self)

    monkeypatch.setattr(tuner, "append_records", stop_after_three)
    monkeypatch.setattr(tuner, "Measurer", Watched)
    with pytest.raises(KeyboardInterrupt):
        ts.tune(small_model(), trials=8, records=records, threads=1)
    assert len(read_records(records).records) == 3
    assert all(process._process is None for process in started[0]._processes)


def test_failures_are_kept_and_not_tried_again(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = misbehaving_worker(tmp_path, crash=4)
    monkeypatch.setattr(tuner, "Measurer", partial(Measurer, program=worker))
    found = ts.tune(small_model(), trials=8, records=records, threads=1)
    crashed = [r for r in read_records(records).records if r.status == "crashed"]
    assert crashed and found.tasks[0].failures == len(crashed)
    assert found.tasks[0].us is not None
    again = ts.tune(small_model(), trials=8, records=records, threads=1)
    assert again.tasks[0].reused == 8
    assert "failed" in str(again)


def test_code_for_another_processor_needs_a_tracker(records: Path) -> None:
    foreign = json.dumps({"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+xop"]})
    with pytest.raises(TuningError, match="does not run on this machine"):
        ts.tune(small_model(), target=foreign, records=records)
    assert not records.exists()


def test_a_tracker_that_is_not_there_is_said_in_a_sentence(records: Path) -> None:
    for tracker, words in (("here", "HOST:PORT"), ("127.0.0.1:1/box", "cannot be reached")):
        with pytest.raises(TuningError, match=words):
            ts.tune(small_model(), records=records, tracker=tracker)


def test_records_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(RecordError, match="no file"):
        ts.plan(small_model(), records=path)
    path.write_text("this is\nno record\n")
    with pytest.raises(RecordError, match="no tuning records"):
        ts.compile(small_model(), records=path)


def test_every_template_can_be_measured_or_says_why_not(tmp_path: Path) -> None:
    job = small_job(tokens=4)
    with job_folder(job) as folder, Measurer(1) as measurer:
        for template in TEMPLATES:
            space = list(template.space(job.workload, job.machine))
            if not template.supports(job.workload, job.machine) or not space:
                continue
            outcome = dict(measurer.measure(folder, [Candidate(template.name, space[0])]))[0]
            assert outcome.status == "ok", (template.name, outcome.message)
