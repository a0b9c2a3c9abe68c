"""Calibration: measured in a moment, kept in a file, used on this machine only."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tuning_support import small_model
from tvm_sparse.schedules.lookup import template_named
from tvm_sparse.schedules.x86.cost import PRICE_NAMES

import tvm_sparse as ts
from tvm_sparse.calibration import calibrated
from tvm_sparse.cpu_features import machine_identity
from tvm_sparse.errors import TargetError
from tvm_sparse.profile import profile_weight
from tvm_sparse.records import RecordFile, read_records
from tvm_sparse.targets import machine_of, resolve_target
from tvm_sparse.tuning import calibrate as module
from tvm_sparse.tuning.calibrate import calibrate, calibration_path, load_calibration
from tvm_sparse.tuning.core_speed import CoreSpeed
from tvm_sparse.workload import MatmulGeometry, Workload

TARGET = resolve_target("native")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One short calibration, and the file that it wrote."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_SPARSE_HOME", str(home / "not yet there"))
        found = calibrate(seconds=2)
        path = calibration_path(machine_identity(), TARGET)
    return found, path.read_text()


@pytest.fixture
def stored(measured, monkeypatch, tmp_path):
    """The same file, in a folder of the test's own."""
    monkeypatch.setenv("TVM_SPARSE_HOME", str(tmp_path))
    path = calibration_path(machine_identity(), TARGET)
    path.write_text(measured[1])
    return path


def test_what_is_written_is_read(measured, stored):
    assert load_calibration(machine_identity(), TARGET) == measured[0]


def test_rates_and_prices_are_sensible(measured):
    found, _ = measured
    core = found.core
    assert core.fma_gflops > 1
    assert core.l1_gbytes > core.memory_gbytes > 0.1
    assert set(found.prices) == set(PRICE_NAMES)
    assert all(0 < price < math.inf for price in found.prices.values())
    assert found.samples > 0
    assert 0.1 < found.gigahertz < 20
    for words in ("GFLOP/s", "memory", "kernels measured"):
        assert words in str(found)


def test_a_plan_uses_it(measured, stored):
    machine = calibrated(machine_of(TARGET, 1), TARGET)
    assert dict(machine.prices) == measured[0].prices
    workload = Workload("matmul", MatmulGeometry(96, 80, 40))
    weight = np.eye(96, 80, dtype=np.float32)
    for name in ("register_tile", "sliced_rows", "dense_panels"):
        template = template_named(name)
        for config in template.space(workload, machine):
            us = template.estimate(workload, machine, profile_weight(weight), config)
            assert 0 < us < math.inf


def test_without_one_the_table_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("TVM_SPARSE_HOME", str(tmp_path))
    assert load_calibration(machine_identity(), TARGET) is None
    assert calibrated(machine_of(TARGET, 1), TARGET).prices == ()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"version": 1}', "\x00\xff", '{"version": 1, "prices": 3}'],
)
def test_a_damaged_file_is_ignored_and_said(stored, text):
    stored.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="damaged and was ignored"):
        assert load_calibration(machine_identity(), TARGET) is None


@pytest.mark.parametrize("price", [-1, 0, "1", None, True, float("nan"), float("inf")])
def test_a_price_that_is_none_is_not_used(stored, price):
    data = json.loads(stored.read_text())
    data["prices"]["fma"] = price
    stored.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="damaged and was ignored"):
        assert load_calibration(machine_identity(), TARGET) is None


@pytest.mark.parametrize("key", ["machine", "target", "version"])
def test_that_of_another_machine_is_not_used(stored, key):
    data = json.loads(stored.read_text())
    other = {"machine": "another one", "target": {"kind": "llvm", "mcpu": "old"}, "version": 0}
    data[key] = other[key]
    stored.write_text(json.dumps(data))
    assert load_calibration(machine_identity(), TARGET) is None


def test_machines_and_targets_have_files_of_their_own():
    other = resolve_target("x86-64-v3")
    paths = {
        calibration_path(machine, target)
        for machine in (machine_identity(), "another one")
        for target in (TARGET, other)
    }
    assert len(paths) == 4


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("TVM_SPARSE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_path("a", TARGET).parent == tmp_path / "tvm_sparse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration_path("a", TARGET).parent == tmp_path / ".cache" / "tvm_sparse"


def test_a_foreign_target_is_refused(monkeypatch):
    monkeypatch.setattr(module, "missing_features", lambda required: ["avx512fp16"])
    with pytest.raises(TargetError, match="avx512fp16"):
        calibrate(seconds=0)


def test_ctrl_c_leaves_nothing(monkeypatch, tmp_path):
    core = CoreSpeed(100.0, 100.0, 50.0, 40.0, 10.0, None)
    monkeypatch.setattr(module, "measure_core", lambda *arguments: core)
    monkeypatch.setattr(module, "measure_gigahertz", lambda *arguments: 3.0)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(seconds=0, path=tmp_path / "file.json")
    assert not list(tmp_path.iterdir())


def test_the_first_kernels_tell_of_every_template():
    machine = replace(machine_of(TARGET, 1), gigahertz=3.0)
    jobs = module._most_telling_first(module._jobs(machine), machine)
    assert len({id(job) for job in jobs}) == len(jobs)
    first = {job.template for job in jobs[:20]}
    assert first >= {"register_tile", "sliced_rows", "dense_panels", "gemv"}


def test_what_tuning_measured_on_this_machine_is_learned_from(tmp_path):
    path = tmp_path / "records.jsonl"
    ts.tune(small_model(), trials=4, records=path, threads=1)
    file = read_records(path)
    kernels = {record.key for record in file.records if record.ok}
    found = calibrate(seconds=0.5, path=tmp_path / "calibration.json", records=file)
    assert len(kernels) == 4 < found.samples

    elsewhere = [
        replace(record, subject=replace(record.subject, machine="another"))
        for record in file.records
    ]
    assert len(module._recorded(file, TARGET)) == 4
    assert not module._recorded(RecordFile(tuple(elsewhere)), TARGET)
