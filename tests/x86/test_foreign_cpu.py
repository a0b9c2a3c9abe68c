"""Libraries for other processors: built here, run where the instructions are, refused elsewhere.

QEMU's user mode runs Python on an emulated processor (Debian and Ubuntu: the package qemu-user). An
instruction that this processor lacks is illegal there, as on the real one.
"""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tvm_sparse.schedules.lookup import DENSE_FORMATS

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.cpu_features import missing_features
from tvm_sparse.manifest import read_manifest

QEMU = shutil.which("qemu-x86_64")
pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="runs this Python, on x86 only"),
]

TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


@dataclass(frozen=True)
class Processor:
    """What QEMU is asked for, and the flags that Linux shows on such a processor."""

    model: str
    flags: str


_NEHALEM = "pni ssse3 cx16 sse4_1 sse4_2 popcnt"
NEHALEM = Processor("Nehalem", _NEHALEM)
HASWELL = Processor("Haswell-noTSX", f"{_NEHALEM} fma movbe avx f16c abm bmi1 avx2 bmi2")

RUN = """
import sys
# tvm_ffi imports PyTorch where it is installed, which takes long under emulation.
sys.modules["torch"] = None
import numpy as np
from tvm_sparse.deploy import load_module
from tvm_sparse.errors import TargetError
library, x, y = sys.argv[1:]
try:
    module = load_module(library, threads=1)
except TargetError as error:
    print(error)
    sys.exit(3)
np.save(y, module(np.load(x)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library for each target, and an input."""
    folder = tmp_path_factory.mktemp("foreign")
    model = ts.prune(zoo.mlp(sizes=(256, 256, 64), batch=20), sparsity=0.95)
    for target in TARGETS:
        module = ts.compile(model, target=target, threads=1, check=False)
        assert not DENSE_FORMATS.issuperset(layer.format for layer in module.report.layers)
        module.export(folder / f"{target}.so")
    (spec,) = module.inputs
    x = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
    np.save(folder / "x.npy", x)
    return folder


def emulate(folder: Path, target: str, processor: Processor, *, tell: bool = True) -> tuple:
    """Load and run a library on an emulated processor, which Linux describes or not.

    QEMU hands the real machine's /proc/cpuinfo through unless its -L folder has one.
    """
    root = folder / f"{processor.model}-{tell}"
    (root / "proc").mkdir(parents=True, exist_ok=True)
    text = f"model name\t: {processor.model}\nflags\t\t: {processor.flags}\n" if tell else ""
    (root / "proc" / "cpuinfo").write_text(text)
    y = root / f"{target}.npy"
    command = [QEMU, "-L", root, "-cpu", processor.model, sys.executable, "-W", "ignore"]
    command += ["-c", RUN, folder / f"{target}.so", folder / "x.npy", y]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, np.load(y) if y.exists() else done.stderr


@pytest.mark.parametrize(
    ("target", "processor"),
    [("x86-64-v2", NEHALEM), ("x86-64-v2", HASWELL), ("x86-64-v3", HASWELL)],
)
def test_a_library_runs_where_its_instructions_are(
    folder: Path, target: str, processor: Processor
) -> None:
    code, said, y = emulate(folder, target, processor)
    assert code == 0, (said, y)
    library = folder / f"{target}.so"
    if missing_features(read_manifest(library).cpu_features):
        pytest.skip("this machine cannot run the library to compare with")
    here = ts.load_module(library, threads=1)(np.load(folder / "x.npy"))
    np.testing.assert_array_equal(y, here)


@pytest.mark.parametrize(
    ("target", "processor", "lacking"),
    [
        ("x86-64-v3", NEHALEM, "avx2"),
        ("x86-64-v4", NEHALEM, "avx2"),
        ("x86-64-v4", HASWELL, "avx512f"),
    ],
)
def test_a_library_is_refused_elsewhere(
    folder: Path, target: str, processor: Processor, lacking: str
) -> None:
    code, said, _ = emulate(folder, target, processor)
    assert code == 3
    assert said.count("\n") == 1
    assert f"{target}.so' needs instructions that this machine ({processor.model}) lacks: " in said
    assert lacking in said


@pytest.mark.parametrize(("target", "processor"), [("x86-64-v3", NEHALEM), ("x86-64-v4", HASWELL)])
def test_without_the_refusal_an_instruction_would_be_illegal(
    folder: Path, target: str, processor: Processor
) -> None:
    code, _, error = emulate(folder, target, processor, tell=False)
    assert code in (-signal.SIGILL, 128 + signal.SIGILL), error
