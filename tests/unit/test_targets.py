"""Targets: names, JSON, dictionaries; vector widths; refusals in words."""

import json

import pytest
import tvm

from tvm_sparse.errors import TargetError
from tvm_sparse.targets import SHORT_NAMES, machine_of, resolve_target, target_data


@pytest.mark.parametrize(
    ("name", "lanes", "registers"),
    [("x86-64-v2", 4, 16), ("x86-64-v3", 8, 16), ("x86-64-v4", 16, 32)],
)
def test_a_short_name_gives_the_vector_unit_of_its_level(name, lanes, registers):
    machine = machine_of(resolve_target(name), threads=3)
    assert (machine.lanes, machine.registers, machine.threads) == (lanes, registers, 3)
    assert machine.mcpu == name


def test_every_short_name_is_a_target():
    for name in SHORT_NAMES:
        target = resolve_target(name)
        assert target.kind.name == ("cuda" if name.startswith("cuda") else "llvm")
        assert str(resolve_target(target_data(target))) == str(target)


def test_a_gpu_is_known_by_its_architecture_or_the_one_before():
    assert machine_of(resolve_target("cuda-sm90a")).multiprocessors == 132
    newer = {"kind": "cuda", "arch": "sm_120", "host": "llvm"}
    assert machine_of(resolve_target(newer)).arch == "sm_120"
    with pytest.raises(TargetError, match=r"compute capability 8\.0 or higher"):
        machine_of(resolve_target({"kind": "cuda", "arch": "sm_70"}))


@pytest.mark.parametrize("name", ["native", "llvm"])
def test_native_is_this_machine(name):
    target = resolve_target(name)
    assert target.attrs["mcpu"] == tvm.target.codegen.llvm_get_system_cpu()
    assert machine_of(target).lanes >= 4


def test_a_dictionary_its_json_and_the_target_itself_mean_the_same():
    description = {"kind": "llvm", "mcpu": "x86-64-v3"}
    target = resolve_target(description)
    assert str(resolve_target(json.dumps(description))) == str(target)
    assert resolve_target(target) is target


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"kind": "llvm", "mcpu": "znver4"}, 1),
        ({"kind": "llvm", "mcpu": "znver4", "mattr": ["-avx512f"]}, 2),
        ({"kind": "llvm", "mcpu": "znver5"}, 2),
        ("x86-64-v3", 2),
    ],
)
def test_half_width_data_paths_issue_one_multiply_add_a_cycle(target, expected):
    assert machine_of(resolve_target(target)).fma_per_cycle == expected


def test_single_features_count():
    narrow = {"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["-avx512f"]}
    assert machine_of(resolve_target(narrow)).lanes == 8


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("x86-64-v9", "unknown target 'x86-64-v9'; known names are native, x86-64-v2"),
        ("llvm -mcpu=znver5", "unknown target"),
        ("{not json", "not valid JSON"),
        ({"kind": "no-such-kind"}, "TVM does not accept the target"),
        ({"mcpu": "x86-64-v3"}, "TVM does not accept the target"),
    ],
)
def test_a_wrong_target_is_refused_in_a_sentence(target, words):
    with pytest.raises(TargetError, match=words) as refusal:
        resolve_target(target)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"kind": "c"}, "kind 'c'"),
        (
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"},
            "'cortex-a72' is not an x86 processor",
        ),
    ],
)
def test_a_target_without_kernels_is_refused_in_a_sentence(target, words):
    with pytest.raises(TargetError, match=words):
        machine_of(resolve_target(target))


def test_threads_come_from_the_call_then_from_the_environment(monkeypatch):
    target = resolve_target("x86-64-v3")
    monkeypatch.setenv("TVM_NUM_THREADS", "5")
    assert machine_of(target).threads == 5
    assert machine_of(target, 2).threads == 2
    monkeypatch.delenv("TVM_NUM_THREADS")
    assert machine_of(target).threads >= 1
