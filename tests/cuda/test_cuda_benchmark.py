"""The benchmark's libraries are built without a GPU, and described for the run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_cuda_machine_code import pytestmark  # noqa: F401

from tvm_sparse.errors import SparseError
from tvm_sparse.manifest import read_manifest
from tvm_sparse.workload import Conv2dGeometry, MatmulGeometry

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from cuda_build import build
from cuda_cases import OVERHEAD, Case
from cuda_run import Reference, read_cases, weight_of

# A script in there is called as a package of NVIDIA's.
sys.path.pop()

SMALL = (
    Case("small", MatmulGeometry(64, 96, 48), "float32", "unstructured", 0.9, "row_tiles"),
    Case(
        "small",
        Conv2dGeometry(2, 8, 12, 12, 16, (3, 3), padding=(1, 1, 1, 1)),
        "float32",
        "unstructured",
        0.8,
        "row_tiles",
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("built")
    unknown = Case("small", MatmulGeometry(64, 64, 64), "float16", "2:4", 0.5, "no_such_format")
    build(path, [*SMALL, unknown], "cuda-sm90a", configs=2)
    return path


def test_cases_are_described_and_hold_machine_code(folder):
    data = read_cases(folder)
    assert data["target"] == "cuda-sm90a" and data["machine"]["arch"] == "sm_90a"
    assert [entry["name"] for entry in data["cases"]] == [c.name for c in (*SMALL, OVERHEAD)]
    for entry in data["cases"]:
        assert entry["density"] == pytest.approx(1 - entry["zeros"], abs=0.01)
        configs = [library["config"] for library in entry["libraries"]]
        assert len(configs) >= 2 and all(configs.count(config) == 1 for config in configs)
        for library in entry["libraries"]:
            assert library["expected_us"] > 0 and library["packed_bytes"] > 0
            file = folder / library["file"]
            assert b"sm_90a" in file.read_bytes()
            # The configuration that is written down is the one that was built.
            (decision,) = read_manifest(file).plan["decisions"]
            assert decision["config"] == library["config"]


def test_what_no_kernel_takes_is_skipped_with_a_reason(folder):
    (reason,) = read_cases(folder)["skipped"].values()
    assert reason == "no kernel for sm_90a reads the format 'no_such_format' yet"


def test_weights_come_back_from_their_files_and_from_their_seeds(folder):
    for entry in read_cases(folder)["cases"]:
        case = Case.from_data(entry)
        weight = weight_of(folder, entry)
        np.testing.assert_array_equal(weight, case.weight())
        np.testing.assert_array_equal(weight, weight_of(folder, {**entry, "weights": None}))
        assert Reference(case, weight).cuts[0][2].size


def test_building_more_keeps_what_was_built(folder):
    before = read_cases(folder)
    build(folder, SMALL[:1], "cuda-sm90a", weights=False)
    after = read_cases(folder)
    assert {e["name"] for e in after["cases"]} == {e["name"] for e in before["cases"]}
    assert [e["weights"] for e in after["cases"] if e["name"] == SMALL[0].name] == [None]
    assert len(json.loads((folder / "cases.json").read_text())["skipped"]) == 1


def test_a_processor_is_no_target_for_it(tmp_path):
    with pytest.raises(SparseError, match="is no GPU"):
        build(tmp_path, SMALL[:1], "x86-64-v3")


def test_a_folder_without_cases_is_refused(tmp_path):
    with pytest.raises(SparseError, match="holds no cases"):
        read_cases(tmp_path)
