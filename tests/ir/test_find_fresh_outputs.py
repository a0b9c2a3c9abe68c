"""Only outputs that a kernel writes anew are handed out without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from load_support import onnx_model, random
from onnx import helper

import tvm_sparse as ts


def compiled(*nodes: Any, outputs: tuple[str, ...] = ("y",)) -> ts.CompiledModule:
    weights = {"w": random(8, 8), "c": random(4, 8)}
    proto = onnx_model(list(nodes), weights, {"x": (4, 8)}, outputs)
    return ts.compile(proto, check=False, threads=1)


def matmul(result: str = "y", data: str = "x") -> Any:
    return helper.make_node("MatMul", [data, "w"], [result])


def test_a_kernel_s_result_is_handed_out_as_it_is() -> None:
    module = compiled(matmul())
    assert module.manifest.fresh_outputs == (True,)
    first = module(np.ones((4, 8), "float32"))
    kept = first.copy()
    for _ in range(3):
        module(np.zeros((4, 8), "float32"))
    assert np.array_equal(first, kept)
    first[:] = 7
    assert not (module(np.zeros((4, 8), "float32")) == 7).any()


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([helper.make_node("Identity", ["x"], ["y"])], ("y",)),
        ([helper.make_node("Unsqueeze", ["x", "axis"], ["y"])], ("y",)),
        ([matmul(), helper.make_node("Identity", ["c"], ["z"])], ("y", "z")),
        ([matmul(), helper.make_node("Identity", ["y"], ["z"])], ("y", "z")),
    ],
    ids=["input", "view of an input", "constant", "the same twice"],
)
def test_what_others_hold_is_copied(nodes: list[Any], outputs: tuple[str, ...]) -> None:
    weights = {"w": random(8, 8), "c": random(4, 8), "axis": np.array([0])}
    module = ts.compile(onnx_model(nodes, weights, {"x": (4, 8)}, outputs), check=False, threads=1)
    assert not all(module.manifest.fresh_outputs)
    x = np.ones((4, 8), "float32")
    before = [np.copy(value) for value in module.run({"x": x}).values()]
    for value in module.run({"x": x}).values():
        value[...] = 5
    assert (x == 1).all()
    after = module.run({"x": x}).values()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
