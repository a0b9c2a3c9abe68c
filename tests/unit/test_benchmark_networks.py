"""The benchmarks of whole networks: what they say of the numbers that they measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from benchmark_support import importable_benchmarks  # noqa: F401
from test_bench import CASE, RESULT


def test_a_page_holds_every_network_against_what_was_asked():
    from networks import Network, page

    network = Network("net", lambda: None, (0.8, 0.9), {0.8: 5.0, 0.9: 3.0})
    cases = [replace(CASE, name=f"net @ {share}", threads=1) for share in ("80%", "90%")]
    text = page(replace(RESULT, cases=tuple(cases)), [network])
    assert "MISSED  net @ 80%: 4.00x (aimed at 5.00x)" in text
    assert "met     net @ 90%: 4.00x (aimed at 3.00x)" in text


def test_a_jump_is_told_by_the_size_where_it_comes():
    from sizes import jumps, table

    times = {16: 10.0, 17: 15.0, 18: 15.0, 32: 9.0}
    assert jumps(times) == {17: 1.5, 18: 1.0, 32: 0.6}
    assert "1.50 (at 17) | 17: 1.50 |" in table({"net": times})
    assert table({"net": {1: 4.0, 2: 2.0}}).endswith("| none |")


@pytest.mark.parametrize(
    ("symbol", "kind"),
    [
        ("sliced_ell_matmul_of_3_1", "sparse layers"),
        ("dense_conv2d_1", "dense layers"),
        ("plain_conv2d_2", "dense layers"),
        ("attention_panels", "attention"),
        ("layer_norm_panels", "layer norm"),
        ("vm.builtin.reshape", "the virtual machine"),
        ("fused_add_relu", "elementwise and other"),
    ],
)
def test_a_kernel_counts_as_one_kind(symbol, kind):
    from time_budget import kind_of

    assert kind_of(symbol) == kind


def test_the_suite_lists_what_plain_tvm_passes_and_we_do_not():
    from onnx_suite import summary

    results = {
        "node/a": {"tvm": "ok", "tvm_sparse": "ok"},
        "node/b": {"tvm": "ok", "tvm_sparse": "wrong numbers"},
        "node/c": {"tvm": "wrong numbers", "tvm_sparse": "ok"},
    }
    text = summary(results)
    assert "plain TVM passes 2, this compiler 2: 1 more" in text
    assert "- `node/b`: wrong numbers" in text


def test_a_case_of_the_suite_is_run_and_compared():
    from onnx_suite import Case, outcome

    graph = onnx.parser.parse_graph("g (float[3] x) => (float[3] y) { y = Relu(x) }")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    x = np.array([-1, 0, 2], np.float32)
    right, wrong = np.maximum(x, 0), np.abs(x)
    assert outcome("tvm_sparse", lambda: Case(model, [([x], [right])])) == "ok"
    assert outcome("tvm_sparse", lambda: Case(model, [([x], [wrong])])) == "wrong numbers"
    assert "float32(3,)" in outcome("tvm_sparse", lambda: Case(model, [([x], [right[:2]])]))


@pytest.mark.parametrize("name", ["gelu 128x3072", "max pool 3x3/2 64@112", "resize 2x, 64@28"])
def test_the_chains_of_dense_operators_are_valid_models(name):
    from dense_ops import OPERATORS

    inferred = onnx.shape_inference.infer_shapes(OPERATORS[name](), strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True)


def test_estimates_of_gpus_name_what_binds_and_a_dense_library():
    from cuda_estimates import TARGETS, table

    case = {"us": 10.0, "dense_us": 20.0, "binds": "shared memory"}
    text = table({"layer": dict.fromkeys(TARGETS, case)})
    assert text.splitlines()[-1].startswith("| layer | 10 (2.0x; shared memory) |")
