"""Matrices of DLMC are read as they were written, and become cases of both benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_support import BENCHMARKS, importable_benchmarks  # noqa: F401
from sparse_forms import unstructured

from tvm_sparse.errors import InputError


def written(path: Path, mask: np.ndarray) -> Path:
    """Write a file as DLMC has them."""
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
    lines = [
        f"{mask.shape[0]}, {mask.shape[1]}, {mask.sum()}",
        " ".join(map(str, starts)),
        " ".join(map(str, np.nonzero(mask)[1])),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 48)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_what_was_written_is_read(tmp_path: Path, shape: tuple[int, int], density: float) -> None:
    from smtx import read_smtx

    mask = unstructured(*shape, density, 0) != 0
    np.testing.assert_array_equal(read_smtx(written(tmp_path / "m.smtx", mask)), mask)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "first line is not 'rows, columns, nonzeros'"),
        ("2, 3\n0 1\n0", "first line is not 'rows, columns, nonzeros'"),
        ("2, -3, 1\n0 1 1\n0", "first line is not 'rows, columns, nonzeros'"),
        ("2, x, 1\n0 1 1\n0", "line 1 holds something that is no number"),
        ("2, 3, 1\n0 1 1\n0.5", "line 3 holds something that is no number"),
        ("2, 3, 1\n0 1\n0", "2 rows need 3 offsets, and it has 2"),
        ("2, 3, 2\n0 1 2\n0", "it says 2 nonzeros, and has 1 column indices"),
        ("2, 3, 2\n0 3 2\n0 1", "row offsets do not rise from 0 to 2"),
        ("2, 3, 2\n1 1 2\n0 1", "row offsets do not rise from 0 to 2"),
        ("2, 3, 2\n0 1 2\n0 3", "a column index is not one of 3 columns"),
        ("2, 3, 2\n0 2 2\n1 1", "a column index comes twice in a row"),
        ("99999999999999999999, 3, 2\n0\n1", "line 1 holds something that is no number"),
    ],
)
def test_what_is_malformed_is_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    from smtx import read_smtx

    path = tmp_path / "bad.smtx"
    path.write_text(text)
    with pytest.raises(
        InputError, match=f"bad.smtx' is no matrix in the format of DLMC: .*{words}"
    ):
        read_smtx(path)


def test_a_file_that_is_missing_or_binary_cannot_be_read(tmp_path: Path) -> None:
    from smtx import read_smtx

    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary"):
        with pytest.raises(InputError, match=f"{name}' cannot be read"):
            read_smtx(tmp_path / name)


def test_a_file_becomes_a_case_of_the_benchmark_of_kernels(tmp_path: Path) -> None:
    from cases import file_case

    mask = unstructured(24, 40, 0.2, 1) != 0
    case, density = file_case(written(tmp_path / "magnitude_0.8.smtx", mask), 16)
    assert case.name == "magnitude_0.8 24x40x16"
    assert density == pytest.approx(mask.mean())
    np.testing.assert_array_equal(case.weight(density) != 0, mask)
    assert case.input().shape == (16, 40)
    assert case.workload().geometry.weight_shape == (24, 40)


def test_what_is_asked_of_our_shapes_is_not_asked_of_files() -> None:
    from summary import target_lines
    from test_benchmark_kernels import content

    for group, asked in (("bert", True), ("dlmc", False)):
        found = content()
        found["cases"][0]["group"] = group
        found["environment"] = {"limits": {"memory_gbytes": 1.0}}
        assert bool(list(target_lines("matmul", found))) == asked


def test_a_file_becomes_cases_of_the_benchmark_of_gpus(tmp_path: Path) -> None:
    from cuda_cases import Case, file_cases

    mask = unstructured(24, 40, 0.2, 1) != 0
    cases = file_cases(written(tmp_path / "magnitude_0.8.smtx", mask), 16)
    assert {case.format for case in cases} == {"two_four", "row_tiles"}
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.name.startswith("smtx-") and "/magnitude_0.8/24x40x16/" in case.name
        assert Case.from_data(json.loads(json.dumps(case.to_data()))) == case
        np.testing.assert_array_equal(case.weight() != 0, mask)


@pytest.mark.parametrize("command", [["kernels.py"], ["cuda.py", "build", "-o", "out"]])
def test_a_malformed_file_is_told_before_anything_is_measured(
    tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "bad.smtx").write_text("1, 1")
    # In a process of its own: a package of NVIDIA's is called cuda, too.
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:], "--smtx", "bad.smtx"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "'bad.smtx' is no matrix in the format of DLMC" in done.stderr
    assert "Traceback" not in done.stderr
