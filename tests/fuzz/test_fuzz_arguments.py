"""Whatever stands on the command line is understood or is wrong usage, in a line."""

from __future__ import annotations

import contextlib
import io

import pytest
from fuzz_parsers import is_a_sentence
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tvm_sparse.cli import build_parser
from tvm_sparse.errors import ModelError, TuningError
from tvm_sparse.frontends.shapes import solve_dimensions
from tvm_sparse.model import TensorSpec
from tvm_sparse.tuning.measurer import Fleet

# Arguments that are parsed -> the rest of a command line that has them.
ARGUMENTS: dict[str, list[str]] = {
    "--shape": ["inspect", "m.onnx"],
    "--force": ["compile", "m.onnx", "-o", "m.so"],
    "--forbid": ["compile", "m.onnx", "-o", "m.so"],
    "--threads": ["compile", "m.onnx", "-o", "m.so"],
    "--pattern": ["prune", "m.onnx", "-o", "p.onnx"],
    "--sparsity": ["prune", "m.onnx", "-o", "p.onnx"],
    "--calibration": ["prune", "m.onnx", "-o", "p.onnx"],
    "--seed": ["prune", "m.onnx", "-o", "p.onnx"],
    "--trials": ["tune", "m.onnx", "--records", "r.jsonl"],
    "--seconds": ["tune", "m.onnx", "--records", "r.jsonl"],
    "--dense-trials": ["tune", "m.onnx", "--records", "r.jsonl"],
    "--input": ["run", "m.so"],
    "--against": ["bench", "m.onnx"],
    "--repeats": ["bench", "m.onnx"],
}

pieces = st.sampled_from(
    (
        *("x=", "=", ",", ":", "1", "128", "-1", "0", "²", "٣", "1e400", "nan", "inf", "%"),
        *("9" * 5000, "block", "2:4", "64:2:8", "tile-wise:", "+5%", "vector:", "1x8", "tvm"),
        *("\n", "\x1b", "*"),
    )
)
texts = st.lists(pieces, max_size=5).map("".join) | st.text(max_size=20)


@pytest.mark.parametrize("argument", ARGUMENTS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(text=texts)
def test_an_argument_is_understood_or_wrong_usage(argument: str, text: str) -> None:
    said = io.StringIO()
    line = [*ARGUMENTS[argument], f"{argument}={text}"]
    with contextlib.redirect_stderr(said):
        try:
            build_parser().parse_args(line)
        except SystemExit as stop:
            assert stop.code == 2
            assert "Traceback" not in said.getvalue()
            assert f"argument {argument}" in said.getvalue()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(texts)
@example("host:99999/key")
@example("host:²/key")
def test_a_tracker_is_understood_or_refused(text: str) -> None:
    try:
        assert 0 <= Fleet.parse(text).port < 1 << 16
    except TuningError as error:
        assert is_a_sentence(str(error))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.integers() | st.sampled_from([1, 2, 2**31, 2**63, 2**64]), max_size=3))
def test_a_shape_fits_or_is_refused(sizes: list[int]) -> None:
    spec = TensorSpec("x", ("batch", 4), "float32")
    try:
        assert solve_dimensions([spec], {"x": sizes}) == {"batch": sizes[0]}
    except ModelError as error:
        assert is_a_sentence(str(error))
