"""What a library needs of the processor is compared with what the processor has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tvm_sparse.cpu_features import X86_FEATURES, machine_flags, missing_features

HASWELL = "pni ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt avx f16c abm bmi1 avx2 bmi2"


def cpuinfo(folder: Path, *flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text("".join(f"processor\t: {i}\nflags\t\t: {f}\n\n" for i, f in enumerate(flags)))
    return path


def test_what_the_machine_has_is_not_missing(tmp_path: Path) -> None:
    v3 = ["sse4.2", "popcnt", "lzcnt", "movbe", "bmi", "bmi2", "avx", "avx2", "fma", "f16c"]
    assert missing_features(v3, cpuinfo(tmp_path, HASWELL)) == []


def test_what_the_machine_lacks_is_named_in_order(tmp_path: Path) -> None:
    wanted = ["avx2", "avx512f", "avx512vl", "avx512bf16"]
    lacking = missing_features(wanted, cpuinfo(tmp_path, HASWELL))
    assert lacking == ["avx512f", "avx512vl", "avx512bf16"]


def test_a_feature_of_some_cores_only_counts_as_missing(tmp_path: Path) -> None:
    path = cpuinfo(tmp_path, HASWELL + " avx512f", HASWELL)
    assert missing_features(["avx512f"], path) == ["avx512f"]


def test_a_system_that_does_not_tell_is_tried(tmp_path: Path) -> None:
    assert machine_flags(tmp_path / "nothing") is None
    assert missing_features(["avx512f"], tmp_path / "nothing") == []
    assert missing_features(["avx512f"], cpuinfo(tmp_path)) == []


def test_an_unknown_feature_is_looked_up_as_it_stands(tmp_path: Path) -> None:
    path = cpuinfo(tmp_path, HASWELL + " avx99")
    assert missing_features(["avx99", "avx100"], path) == ["avx100"]


@pytest.mark.parametrize(
    ("mcpu", "newest", "beyond"),
    [
        ("x86-64-v2", "sse4.2", "avx"),
        ("x86-64-v3", "avx2", "avx512f"),
        ("x86-64-v4", "avx512vl", "avx512vnni"),
        ("sapphirerapids", "avx512bf16", "sse4a"),
    ],
)
def test_a_target_needs_what_its_processor_brought(mcpu: str, newest: str, beyond: str) -> None:
    tvm = pytest.importorskip("tvm")
    from tvm_sparse.cpu_features import required_features

    needed = required_features(tvm.target.Target({"kind": "llvm", "mcpu": mcpu}))
    assert newest in needed and beyond not in needed
    assert [name for name in X86_FEATURES if name in needed] == list(needed)


def test_switched_off_features_are_not_needed() -> None:
    tvm = pytest.importorskip("tvm")
    from tvm_sparse.cpu_features import required_features

    target = {"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["-avx512vl"]}
    assert "avx512vl" not in required_features(tvm.target.Target(target))


def test_asking_the_machine_imports_no_tvm() -> None:
    code = (
        "import sys; from tvm_sparse.cpu_features import missing_features; "
        "missing_features(['avx']); assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
