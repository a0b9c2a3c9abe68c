"""The benchmark of kernels: its ratios, its file, its shapes."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark_support import importable_benchmarks  # noqa: F401


def spread(median):
    return {"median": median, "low": median, "high": median}


def content(density=0.1, hot=10.0, bar=12.0):
    systems = {
        "plan": {"what": "", "hot": spread(hot), "cold": spread(2 * hot)},
        "bar": {"what": "", "hot": spread(bar)},
    }
    floors = {"hot": 1.0, "binds": "FMA", "l1": 1.0, "packed_bytes": 1000}
    entry = {"density": density, "nnz": 1, "systems": systems, "floors": floors}
    peers = {"onnxruntime": {"hot": spread(80.0)}, "openvino f32": {"hot": spread(60.0)}}
    case = {"name": "8x8x8", "group": "bert", "peers": peers, "densities": [entry]}
    return {"cases": [case]}


def test_ratios_take_the_better_peer():
    from summary import rows

    (row,) = rows("matmul", content())
    assert row.over_dense("plan") == pytest.approx(6)
    assert row.over_bar("plan") == pytest.approx(1.2)
    assert row.over_dense("best") is None
    assert row.cold_over_hot("plan") == pytest.approx(2)
    assert row.cold_allowance("plan", memory_gbytes=1.0) == pytest.approx(20 / 16)


@pytest.mark.parametrize(("needed", "word"), [(5.9, "met"), (6.1, "MISSED")])
def test_a_target_says_whether_it_is_met(needed, word):
    from summary import Target, rows

    target = Target("speed", needed, lambda row: row.over_dense("plan"))
    assert target.line(rows("matmul", content())).startswith(word)
    assert target.line([]) == ""


def test_a_case_replaces_the_older_one_of_its_name(tmp_path):
    from results import Store

    store = Store(tmp_path / "kernels.json")
    store.add("matmul", {"cpu": "a"}, {"name": "x", "value": 1})
    store.add("matmul", {"cpu": "a"}, {"name": "y", "value": 2})
    store.add("matmul", {"cpu": "a"}, {"name": "x", "value": 3})
    assert [case["value"] for case in store.read()["matmul"]["cases"]] == [3, 2]
    store.add("matmul", {"cpu": "b"}, {"name": "z", "value": 4})
    assert [case["name"] for case in store.read()["matmul"]["cases"]] == ["z"]


def test_cores_start_where_they_are_asked_to():
    from kernels import pick_cores

    assert pick_cores([0, 1], None, 1) == [0]
    assert pick_cores([0, 1], 1, 2) == [1, 0]
    assert pick_cores([0], None, 2) == []


def test_sections_have_cases_of_distinct_names():
    from cases import QUICK, SECTIONS
    from kernels import THREADS

    assert list(SECTIONS) == list(THREADS) == list(QUICK)
    for section in SECTIONS.values():
        names = [case.name for case in section.cases]
        assert len(set(names)) == len(names)
        assert section.threads == THREADS[section.name]


def test_pruned_weights_have_the_density_asked_for():
    from pruned_weights import pruned_conv, pruned_matrix

    assert np.count_nonzero(pruned_matrix(64, 96, 0.9)) == pytest.approx(614, abs=1)
    conv = pruned_conv(32, 32, 3, 0.9)
    assert (conv.reshape(1024, -1) == 0).all(1).mean() > 0.5
