"""The rewritten module: kernels in the place of operators, nothing left over, well-formed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from load_support import onnx_model, random
from onnx import helper
from tvm import relax
from tvm_sparse.passes.collect_weights import collect_weights
from tvm_sparse.passes.rename_functions import rename_functions
from tvm_sparse.passes.rewrite_main import bindings_of

import tvm_sparse as ts
from tvm_sparse import zoo
from tvm_sparse.pipeline import Lowered, lower_model
from tvm_sparse.planner import Plan
from tvm_sparse.targets import machine_of, resolve_target

TARGET = "x86-64-v3"


def lowered(source: Any, **options: Any) -> tuple[Lowered, Plan]:
    model = ts.load(source)
    plan = ts.plan(model, TARGET, threads=1, **options)
    machine = machine_of(resolve_target(TARGET), 1)
    return lower_model(model, collect_weights(model), plan, machine), plan


def calls_of(mod: tvm.IRModule) -> Counter[str]:
    """Operators of `main`; a call of a kernel counts under the kernel's name."""
    names: Counter[str] = Counter()
    for binding in bindings_of(mod["main"]):
        value = binding.value
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            name = value.op.name.removeprefix("relax.")
            names[value.args[0].name_hint if name == "call_tir" else name] += 1
    return names


def chain(names: str, sizes: list[int], rank: int = 2) -> onnx.ModelProto:
    """Matmuls with bias and ReLU, one behind the other."""
    nodes, weights, x = [], {}, "x"
    for index, name in enumerate(names.split()):
        weights[f"w{index}"] = random(sizes[index], sizes[index + 1], seed=index)
        weights[f"b{index}"] = random(sizes[index + 1], seed=index + 50)
        nodes.append(helper.make_node("MatMul", [x, f"w{index}"], [f"h{index}"], name=name))
        nodes.append(helper.make_node("Add", [f"h{index}", f"b{index}"], [f"a{index}"]))
        x = f"r{index}"
        nodes.append(helper.make_node("Relu", [f"a{index}"], [x]))
    shape = (*([2] * (rank - 2)), 5, sizes[0])
    return onnx_model(nodes, weights, {"x": shape}, (x,))


def test_operators_and_what_is_fused_behind_them_become_one_call_each():
    result, _ = lowered(chain("a b", [16, 12, 8]), force={"*": "register_tiled"})
    assert calls_of(result.mod) == {"register_tiled_matmul_1": 1, "register_tiled_matmul_2": 1}
    relax.analysis.well_formed(result.mod)


def test_weights_that_were_packed_and_dead_code_are_gone():
    result, _ = lowered(chain("a b", [16, 12, 8]))
    assert [variable.name for variable in result.mod["main"].params] == ["x"]
    functions = {name.name_hint for name in result.mod.get_global_vars()}
    assert functions == {"main", *result.kernels}


def test_layers_that_need_the_same_share_one_function():
    proto = chain("a b c d", [16, 16, 16, 16, 8])
    result, _ = lowered(proto, force={"*": "register_tiled"})
    assert calls_of(result.mod) == {"register_tiled_matmul_1": 3, "register_tiled_matmul_2": 1}
    assert sorted(result.kernels.values()) == [("a", "b", "c"), ("d",)]
    functions = [f for _, f in result.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(functions) == 2


def test_layers_with_another_epilogue_share_none():
    proto = onnx_model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="a"),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"], name="b"),
        ],
        {"w": random(16, 16), "v": random(16, 16, seed=1)},
        {"x": (5, 16)},
    )
    result, _ = lowered(proto, force={"*": "register_tiled"})
    assert len(result.kernels) == 2


def test_activations_of_higher_rank_are_reshaped_around_the_kernel():
    result, _ = lowered(chain("a", [16, 12], rank=3), force={"*": "register_tiled"})
    assert calls_of(result.mod) == {"register_tiled_matmul_1": 1, "reshape": 2}
    assert list(result.mod["main"].ret_ty.shape) == [2, 5, 12]
    relax.analysis.well_formed(result.mod)


def test_what_the_plan_leaves_to_tvm_stays_as_it_was():
    proto = chain("a b", [16, 12, 8])
    model = ts.load(proto)
    full = ts.plan(model, TARGET, threads=1)
    decisions = tuple(
        type(d)(d.name, d.op, "dense", "tvm", {}, "user", "by hand") for d in full.decisions
    )
    plan = Plan(full.target, full.threads, full.digest, decisions)
    result = lower_model(model, collect_weights(model), plan, machine_of(resolve_target(TARGET), 1))
    assert calls_of(result.mod) == {"matmul": 2, "add": 2, "nn.relu": 2}
    assert result.kernels == {}
    relax.analysis.well_formed(result.mod)


def test_one_packed_weight_stands_for_both_uses():
    proto = onnx_model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="a"),
            helper.make_node("MatMul", ["h", "w"], ["y"], name="b"),
        ],
        {"w": random(16, 16)},
        {"x": (5, 16)},
    )
    result, _ = lowered(proto, force={"*": "register_tiled"})
    assert calls_of(result.mod) == {"register_tiled_matmul_1": 2}


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_transformer_is_well_formed_and_has_no_matmul_with_a_weight_left(symbolic):
    proto = zoo.bert_encoder(layers=1, hidden=32, heads=2, ffn=64, seq=6, symbolic=symbolic)
    result, plan = lowered(ts.prune(proto, sparsity=0.9, scope="layer"))
    relax.analysis.well_formed(result.mod)
    found = calls_of(result.mod)
    assert found["matmul"] == 2  # scores and context, of activations only
    assert sum(found[symbol] for symbol in result.kernels) == len(plan.decisions) == 6
    assert found["erf"] == 0


def test_packed_bytes_are_those_of_the_arrays():
    result, plan = lowered(chain("a b", [16, 12, 8]), force={"*": "register_tiled"})
    for fused_call, decision in zip(result.calls.values(), plan.decisions, strict=True):
        total = sum(array.nbytes for array in fused_call.arrays)
        assert result.packed_bytes[decision.name] == total


def test_symbols_of_the_module_itself_are_not_taken():
    model = ts.load(chain("a", [16, 12]))
    result, _ = lowered(model, force={"*": "register_tiled"})
    builder = relax.BlockBuilder(model.mod)
    taken = result.mod["register_tiled_matmul_1"]
    builder.add_func(taken, "register_tiled_matmul_1")
    again, _ = lowered(replace(model, mod=builder.get()), force={"*": "register_tiled"})
    assert list(again.kernels) == ["register_tiled_matmul_2"]


def test_functions_are_renamed_all_at_once_and_where_they_are_called():
    builder = relax.BlockBuilder()
    for name, op in (("first", relax.op.nn.relu), ("main", relax.op.negative)):
        x = relax.Var("x", relax.TensorType((4,), "float32"))
        with builder.function(name, [x]):
            builder.emit_func_output(builder.emit(op(x)))
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("last", [x]):
        callee = builder.get().get_global_var("main")
        builder.emit_func_output(builder.emit(relax.Call(callee, [x])))
    mod = rename_functions(builder.get(), {"first": "main", "main": "first", "gone": "x"})
    assert {name.name_hint for name in mod.get_global_vars()} == {"first", "main", "last"}
    assert mod["main"].attrs["global_symbol"] == "main"
    relax.analysis.well_formed(mod)
    executable = tvm.compile(mod, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    data = np.array([-1, 2, -3, 4], np.float32)
    got = {name: machine[name](tvm.runtime.tensor(data)).numpy() for name in ("main", "last")}
    np.testing.assert_array_equal(got["main"], np.maximum(data, 0))
    np.testing.assert_array_equal(got["last"], -data)
