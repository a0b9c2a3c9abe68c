"""A model goes the whole way to a GPU's library on a machine without a GPU."""

from __future__ import annotations

import pytest
from test_cuda_machine_code import pytestmark  # noqa: F401

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.cuda_toolkit import has_gpu
from tvm_sparse.errors import PlanError, TargetError
from tvm_sparse.manifest import read_manifest
from tvm_sparse.targets import resolve_target


@pytest.fixture(scope="module")
def model():
    return ts.prune(zoo.single_matmul(256, 512, 4096), sparsity=0.95, scope="layer")


@pytest.fixture(scope="module")
def module(model):
    return ts.compile(model, target="cuda-sm80")


def test_the_plan_weighs_sparse_kernels_against_tvm_s_own_dense_ones(model):
    decision = ts.plan(model, target="cuda-sm80").decisions[0]
    assert decision.kernel == "cuda_row_tiles"
    assert {c.kernel for c in decision.candidates} > {"cuda_row_tiles", "tvm"}
    dense = ts.plan(model, target="cuda-sm80", forbid=["*"]).decisions[0]
    assert (dense.kernel, dense.reason) == ("tvm", "kept dense by the user")


def test_a_plan_survives_json_with_its_target(model):
    plan = ts.plan(model, target="cuda-sm90")
    assert ts.Plan.from_json(plan.to_json()) == plan
    assert resolve_target(plan.target).host.attrs["mcpu"] == "x86-64-v3"


def test_a_library_holds_machine_code_and_says_what_it_needs(module, tmp_path):
    module.export(tmp_path / "model.so")
    assert b"sm_80" in (tmp_path / "model.so").read_bytes()
    assert read_manifest(tmp_path / "model.so").target["arch"] == "sm_80"


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_a_module_says_so(module, tmp_path):
    assert "needs" in module.report.notes[0] or "GPU" in module.report.notes[0]
    module.export(tmp_path / "model.so")
    with pytest.raises(TargetError, match="NVIDIA GPU"):
        ts.load_module(tmp_path / "model.so")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nt": 3}, "reads vectors of 1, 2, 4"),
        ({"warps": 7}, "cannot share 64 rows out among 7 warps"),
        ({"mt": 256, "warps": 1}, "more than 128 sums a thread"),
    ],
)
def test_a_configuration_that_makes_no_kernel_is_refused(model, change, sentence):
    import dataclasses

    plan = ts.plan(model, target="cuda-sm80")
    decision = plan.decisions[0]
    config = {**decision.config, "mt": 64, "warps": 8, **change}
    edited = dataclasses.replace(plan, decisions=(dataclasses.replace(decision, config=config),))
    with pytest.raises(PlanError, match=sentence):
        ts.compile(model, target="cuda-sm80", plan=edited)
