"""Tuning for GPUs, as far as a machine without one goes: everything up to the measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from kernel_support import MACHINE, TARGET
from test_cuda_machine_code import NVCC
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.schedules.lookup import template_named

import tvm_sparse as ts
from tvm_sparse import tuner, zoo
from tvm_sparse.compiler import profile_site, with_threads
from tvm_sparse.cuda_toolkit import has_gpu, runs_on
from tvm_sparse.errors import TuningError
from tvm_sparse.records import (
    RecordFile,
    Statistics,
    Subject,
    TuningRecord,
    append_records,
    code_digest,
    read_records,
    weight_digest,
)
from tvm_sparse.targets import machine_of, resolve_target, target_data
from tvm_sparse.tuning.book import RecordBook
from tvm_sparse.tuning.job import Job, rotation, rotation_on
from tvm_sparse.tuning.measurer import Candidate, Outcome
from tvm_sparse.tuning.trial import Bench
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry, Workload

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
GPU = "NVIDIA A100-SXM4-80GB"


@pytest.fixture(scope="module")
def model():
    return ts.load(ts.prune(zoo.single_matmul(256, 512, 4096), sparsity=0.95, scope="layer"))


@pytest.fixture(scope="module")
def layer(model):
    site = with_threads(collect_weights(model)[0].site, MACHINE)
    return site, profile_site(model, site)


def small_job(geometry=None, dtype="float32", target=TARGET):
    geometry = geometry or MatmulGeometry(64, 96, 48)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(geometry.weight_shape, np.float32)
    weight[np.abs(weight) < 1.3] = 0
    resolved = resolve_target(target)
    op = "matmul" if isinstance(geometry, MatmulGeometry) else "conv2d"
    workload = Workload(op, geometry, dtype)
    weights = rotation([weight.astype(dtype)])
    return Job(workload, machine_of(resolved, 1), target_data(resolved), weights, [])


def subject_of(site, profile, weight, target=TARGET, machine=f"{GPU}, sm_80"):
    return Subject(
        site.workload,
        (weight_digest(weight),),
        Statistics.of(profile),
        target_data(resolve_target(target)),
        machine,
        code_digest(),
        tvm.__version__,
    )


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_both_ways_to_one_are_named(model, tmp_path):
    records = tmp_path / "records.jsonl"
    with pytest.raises(TuningError) as told:
        ts.tune(model, target=TARGET, records=records)
    sentence = str(told.value)
    assert "sm_80 are measured on an NVIDIA GPU" in sentence
    assert "on a machine with such a GPU" in sentence and "--tracker HOST:PORT" in sentence
    assert not records.exists()


def test_a_gpu_of_another_kind_is_refused(model, monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "gpu_here", lambda: (GPU, 80))
    with pytest.raises(TuningError, match=f"{GPU}.*does not run code for sm_90a"):
        ts.tune(model, target="cuda-sm90a", records=tmp_path / "records.jsonl")


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", 80, True),
        ("sm_80", 90, True),
        ("sm_90", 80, False),
        ("sm_90a", 90, True),
        ("sm_90a", 100, False),
    ],
)
def test_code_runs_on_later_gpus_unless_its_name_ends_in_a_letter(arch, capability, runs):
    assert runs_on(arch, capability) is runs


def test_candidates_are_those_of_the_target_in_the_order_of_their_estimates(layer):
    site, profile = layer
    ranked = tuner.rank(site, profile, MACHINE)
    assert ranked and {entry.candidate.kernel for entry in ranked} == {
        template.name
        for template in tuner.templates_for(MACHINE)
        if template.takes(site.workload, MACHINE)
    }
    estimates = [entry.estimate for entry in ranked]
    assert estimates == sorted(estimates)
    assert len({entry.candidate.key for entry in ranked}) == len(ranked)


@pytest.mark.parametrize(
    "geometry", [MatmulGeometry(64, 96, None), Conv2dGeometry(None, 8, 9, 9, 16, (3, 3))]
)
def test_a_job_comes_back_from_its_folder(geometry, tmp_path):
    job = small_job(geometry)
    job.save(tmp_path)
    again = Job.load(tmp_path)
    assert (again.workload, again.machine, again.target) == (job.workload, MACHINE, job.target)
    assert again.shapes == job.shapes
    np.testing.assert_array_equal(again.weights, job.weights)


def test_small_weights_rotate_until_the_cache_holds_them_no_longer():
    assert rotation_on(MACHINE, 10_000_000, 4) == 4
    assert rotation_on(MACHINE, 1_500_000, 4) == 14
    assert rotation_on(MACHINE, 1000, 4) == 16
    assert rotation_on(machine_of(resolve_target("x86-64-v3"), 1), 1000, 4) == 4
    weights = rotation([np.eye(8, dtype=np.float32)], count=6)
    assert len(weights) == 6
    np.testing.assert_array_equal(weights[-1], np.eye(8))


@needs_nvcc
@pytest.mark.parametrize(
    "geometry",
    [MatmulGeometry(64, 96, 48), Conv2dGeometry(2, 8, 9, 9, 16, (3, 3), padding=(1, 1, 1, 1))],
    ids=["matmul", "conv"],
)
def test_a_candidate_is_built_with_machine_code(geometry, tmp_path):
    job = small_job(geometry)
    bench, template = Bench(job), template_named("cuda_row_tiles")
    assert bench.kind == "cuda"
    config = template.space(job.workload, job.machine)[0]
    executable = bench.build(template.name, config)
    executable.export_library(str(tmp_path / "candidate.so"))
    assert b"sm_80" in (tmp_path / "candidate.so").read_bytes()


def test_activations_have_the_layer_s_type_and_results_may_be_rounded_to_it():
    bench = Bench(small_job(dtype="float16"))
    assert bench.x.dtype == np.float16
    picked, want, bound = bench._expected()
    assert bench._check(want.astype(np.float16)) <= 1
    # Half a unit in the last place of the result, at least.
    assert (bound > 2.0**-12 * np.abs(want)).all() and picked == slice(None)


class RuinedDevice:
    """A GPU whose context a kernel has ended."""

    device, may_be_lost = None, False

    def __init__(self, answers):
        self._answers = answers

    def answers(self):
        return self._answers

    def array(self, values):
        return values


def test_a_gpu_that_a_candidate_ruined_ends_the_process_that_used_it():
    bench = Bench(small_job())
    for answers, expected in ((False, SystemExit), (True, RuntimeError)):
        bench.use(RuinedDevice(answers))
        with pytest.raises(expected, match="illegal address"), bench._on_device():
            raise RuntimeError("CUDA: an illegal address")


def hand_written(model, layer, target=TARGET, **changes):
    site, profile = layer
    weight = model.params[site.param]
    template = template_named("cuda_row_tiles")
    config = dict(list(template.space(site.workload, MACHINE))[5])
    record = TuningRecord(
        subject_of(site, profile, weight, target), template.name, config, "ok", 50.0, 49.0, 51.0, 9
    )
    return replace(record, **changes)


def test_a_record_of_a_gpu_goes_into_a_file_and_comes_back(model, layer, tmp_path):
    record = hand_written(model, layer)
    append_records(tmp_path / "records.jsonl", [record])
    (again,) = read_records(tmp_path / "records.jsonl").records
    assert again == record and again.key == record.key
    assert again.subject.target["arch"] == "sm_80" and GPU in again.subject.machine


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU of its own")
def test_a_plan_takes_the_configuration_that_was_measured(model, layer, tmp_path):
    record = hand_written(model, layer)
    append_records(tmp_path / "records.jsonl", [record])
    decision = ts.plan(model, target=TARGET, records=tmp_path / "records.jsonl").decisions[0]
    assert (decision.source, decision.kernel) == ("record", record.kernel)
    assert decision.config == record.config != ts.plan(model, target=TARGET).decisions[0].config
    assert decision.expected_us == 50.0


def test_records_of_processors_and_of_gpus_never_mix(model, layer, tmp_path):
    site, profile = layer
    digest = weight_digest(model.params[site.param])
    gpu = hand_written(model, layer)
    x86 = replace(
        gpu,
        subject=replace(gpu.subject, target=target_data(resolve_target("x86-64-v3"))),
        kernel="sliced_rows",
        config={"mr": 4, "nt": 1, "kb": 64, "multiple": 48, "threads": 1, "parts": 1, "share": 1},
    )
    assert gpu.subject.key != x86.subject.key
    assert replace(gpu.subject, target=x86.subject.target).key == x86.subject.key
    file = RecordFile((gpu, x86))
    for target, own in ((TARGET, gpu), ("x86-64-v3", x86)):
        book = RecordBook(file, target_data(resolve_target(target)), None, tvm.__version__)
        assert book.measured(site.workload, digest) == [own]
        similar = book.similar(site.workload, Statistics.of(profile))
        assert [hint.record for hint in similar] == [own]
    # Neither disturbs the other's plan, for another weight of that shape either.
    path = tmp_path / "records.jsonl"
    append_records(path, [x86])
    assert ts.plan(model, target=TARGET, records=path) == ts.plan(model, target=TARGET)


class FakeMeasurer:
    """Takes the last proposed candidate to be the fastest, and one to be wrong."""

    width = 1

    def __init__(self, threads, fleet=None):
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, folder, candidates):
        assert Job.load(folder).machine.arch == "sm_80"
        for index, _ in enumerate(candidates):
            self.count += 1
            if self.count == 2:
                yield index, Outcome("wrong", message="off")
            else:
                us = 100.0 - self.count
                yield index, Outcome("ok", us, us, us, 5, 0.1)

    def race(self, folder, candidates):
        return None


def test_a_model_is_tuned_where_a_gpu_is(model, monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "gpu_here", lambda: (GPU, 80))
    monkeypatch.setattr(tuner, "Measurer", FakeMeasurer)
    path = tmp_path / "records.jsonl"
    found = ts.tune(model, target=TARGET, trials=6, records=path)
    assert found.tasks[0].trials == 6 and found.tasks[0].failures == 1
    assert "keeps TVM's own schedule" in str(found)
    assert found.report.target == "sm_80"
    kept = read_records(path).records
    assert {record.subject.machine for record in kept} == {f"{GPU}, sm_80"}
    assert (
        "cuda_two_four"
        in {record.kernel for record in kept}
        <= {template.name for template in tuner.templates_for(MACHINE)}
    )
    again = ts.tune(model, target=TARGET, trials=6, records=path, dense_trials=0)
    assert again.tasks[0].reused == 6 and not again.notes
    fastest = min((r for r in kept if r.ok), key=lambda r: r.us)
    if not has_gpu():
        decision = ts.plan(model, target=TARGET, records=path).decisions[0]
        assert decision.config == fastest.config


def test_a_layer_that_the_plan_leaves_to_tvm_is_measured_all_the_same(monkeypatch, tmp_path):
    dense = ts.load(ts.prune(zoo.single_matmul(64, 64, 16), sparsity=0.3, scope="layer"))
    assert ts.plan(dense, target=TARGET).decisions[0].kernel == "tvm"
    monkeypatch.setattr(tuner, "gpu_here", lambda: (GPU, 80))
    monkeypatch.setattr(tuner, "Measurer", FakeMeasurer)
    found = ts.tune(dense, target=TARGET, trials=3, records=tmp_path / "r.jsonl")
    assert found.tasks[0].us is not None and found.tasks[0].untuned_us is None
    assert Candidate("tvm", {}).key not in {
        Candidate(r.kernel, r.config).key for r in found.records
    }
