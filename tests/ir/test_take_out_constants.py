"""Large constants leave the virtual machine's pool, small ones stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm_sparse.passes.take_out_constants import take_out_constants

from tvm_sparse.weights import LEAST_BYTES, WEIGHTS_FUNCTION

SIDE = 64
LARGE = np.arange(SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
SMALL = np.ones((1, SIDE), np.float32)
assert SMALL.nbytes < LEAST_BYTES <= LARGE.nbytes


def adding(*functions: tuple[str, list[Any]]) -> tvm.IRModule:
    """Functions that add constants to their input, at the place in a pipeline where the pass is."""
    bb = relax.BlockBuilder()
    for name, constants in functions:
        x = relax.Var("x", relax.TensorType((SIDE, SIDE), "float32"))
        with bb.function(name, [x]):
            y = x
            for constant in constants:
                y = bb.emit(relax.op.add(y, constant))
            bb.emit_func_output(y)
    return relax.transform.RemovePurityChecking()(bb.get())


def run(mod: tvm.IRModule) -> tuple[tvm.IRModule, list[np.ndarray]]:
    taken: list[Any] = []
    mod = take_out_constants(taken)(mod)
    relax.analysis.well_formed(mod)
    return mod, [value.numpy() for value in taken]


def asks(function: Any) -> int:
    """Count the calls that ask for the weights."""
    return sum(
        isinstance(binding.value, relax.Call)
        and isinstance(binding.value.op, relax.ExternFunc)
        and binding.value.op.global_symbol == WEIGHTS_FUNCTION
        for block in function.body.blocks
        for binding in block.bindings
    )


def test_a_module_of_small_constants_stays_as_it_is() -> None:
    before = adding(("main", [relax.const(SMALL)]))
    after, taken = run(before)
    tvm.ir.assert_structural_equal(after, before)
    assert taken == []


def test_large_constants_are_taken_in_order_and_asked_for_once() -> None:
    constants = [relax.const(value) for value in (LARGE, SMALL, LARGE + 1)]
    after, taken = run(adding(("main", constants)))
    np.testing.assert_array_equal(taken, [LARGE, LARGE + 1])
    assert asks(after["main"]) == 1
    assert taken_from(after) == []


def taken_from(mod: tvm.IRModule) -> list[np.ndarray]:
    """What a second run of the pass still finds."""
    return run(mod)[1]


def test_a_constant_that_is_used_twice_is_taken_once() -> None:
    constant = relax.const(LARGE)
    _, taken = run(adding(("main", [constant, constant])))
    assert len(taken) == 1


def test_functions_share_the_list_and_only_those_that_use_it_ask() -> None:
    functions = [
        ("first", [relax.const(LARGE)]),
        ("second", [relax.const(SMALL)]),
        ("third", [relax.const(LARGE + 1)]),
    ]
    after, taken = run(adding(*functions))
    assert {value.ravel()[0] for value in taken} == {0, 1}
    assert [asks(after[name]) for name, _ in functions] == [1, 0, 1]


def test_constants_in_branches_are_taken_too() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((SIDE, SIDE), "float32"))
    flag = relax.Var("flag", relax.TensorType((), "bool"))

    def branch(value: np.ndarray) -> Any:
        result = relax.Var("result", relax.TensorType((SIDE, SIDE), "float32"))
        binding = relax.VarBinding(result, relax.op.add(x, relax.const(value)))
        return relax.SeqExpr([relax.BindingBlock([binding])], result)

    with bb.function("main", [x, flag]):
        out = bb.emit(relax.If(flag, branch(LARGE), branch(LARGE + 1)))
        bb.emit_func_output(out)
    after, taken = run(relax.transform.RemovePurityChecking()(bb.get()))
    assert len(taken) == 2 and asks(after["main"]) == 1
