"""The tutorials run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tutorials"
TUTORIALS = sorted(path.name for path in FOLDER.glob("[0-9][0-9]_*.py"))


def test_the_tutorials_are_there():
    assert {"01_compile_a_pruned_model.py", "02_inside_tvm_pipelines.py"} <= set(TUTORIALS)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_to_its_end(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        cwd=tmp_path,
        env={**os.environ, "TVM_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done"
