"""The tutorials run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# It trains for a while, with PyTorch.
TRAINING = "05_prune_finetune_deploy.py"
FOLDER = Path(__file__).resolve().parents[2] / "tutorials"
TUTORIALS = sorted(path.name for path in FOLDER.glob("[0-9][0-9]_*.py"))


def test_the_tutorials_are_there():
    assert {"01_compile_a_pruned_model.py", "02_inside_tvm_pipelines.py"} <= set(TUTORIALS)


def run(name, folder, *options, seconds=300):
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *options],
        cwd=folder,
        env={**os.environ, "TVM_NUM_THREADS": "1", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done"
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", [name for name in TUTORIALS if name != TRAINING])
def test_a_tutorial_runs_to_its_end(name, tmp_path):
    run(name, tmp_path)


@pytest.mark.torch
def test_trained_networks_keep_their_answers_when_they_are_compiled(tmp_path):
    for package in ("torch", "sklearn", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    rows = [line.split() for line in run(TRAINING, tmp_path, "--keep", ".", seconds=900)[1:-1]]
    assert [row[:2] for row in rows] == [
        [network, form]
        for network in ("convnet", "transformer")
        for form in ("dense", "unstructured,")
    ]
    for row in rows:
        held_out, distorted = (float(cell[:-1]) for cell in row if cell.endswith("%") and cell[:-1])
        assert held_out > 80
        assert 50 < distorted < held_out
        assert row[-3:] == ["2250", "of", "2250"]
    packed = [int(row[row.index("KiB") - 1]) for row in rows]
    assert packed[1] < packed[0] / 2 and packed[3] < packed[2] / 2
    assert {path.suffix for path in tmp_path.glob("*unstructured-80.*")} == {".onnx", ".so"}


def test_the_training_tutorial_says_what_it_lacks(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ImportError('hidden', name='sklearn')")
    hidden = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(FOLDER / TRAINING)],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said, last = done.stdout.splitlines()
    assert said.startswith("this tutorial needs ") and "tvm-sparse[tutorials]" in said
    assert last == "done"
