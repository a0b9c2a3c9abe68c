"""Chains of reshapes, transpositions and selections say the same in fewer operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from load_support import onnx_model, ops_of, random, run_model
from onnx import helper
from tvm import relax
from tvm_sparse.passes.follow_axes import follow_axes
from tvm_sparse.passes.rewrite_main import bindings_of, main_of
from tvm_sparse.passes.sink_reshapes import sink_reshapes

from tvm_sparse.frontends.loading import load
from tvm_sparse.model import Model, TensorSpec

MOVES = ("reshape", "permute_dims", "squeeze", "expand_dims", "take", "strided_slice", "multiply")


def evaluate(model: Model, x: np.ndarray) -> np.ndarray:
    """Run chains of these operators in NumPy."""
    function = main_of(model.mod)
    values: dict[Any, np.ndarray] = {function.params[0]: x}
    for binding in bindings_of(function):
        if isinstance(binding.value, relax.Var):
            values[binding.var] = values[binding.value]
            continue
        call, source = binding.value, values[binding.value.args[0]]
        shape = [int(dim) for dim in binding.var.ty.shape.values]
        name = call.op.name.removeprefix("relax.")
        assert name in MOVES
        if name == "permute_dims":
            given = call.attrs.axes
            result = source.transpose(None if given is None else [int(a) for a in given])
        elif name == "take":
            result = source.take(int(call.args[1].value.numpy()), int(call.attrs.axis))
        elif name == "strided_slice":
            axis, begin, end = (int(part.fields[0].value) for part in call.args[1:4])
            result = source.take(range(begin, end), axis)
        elif name == "multiply":
            result = source * call.args[1].value.numpy()
        else:
            result = source.reshape(shape)
        assert list(result.shape) == shape
        values[binding.var] = result
    return values[function.body.body]


def model_of(shape: tuple[int, ...], steps: list[Any]) -> Model:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x], {"num_input": 1}):
        with builder.dataflow():
            value: Any = x
            for step in steps:
                value = builder.emit(step(value))
            output = builder.emit_output(value)
        builder.emit_func_output(output)
    return Model(builder.finalize(), {}, {}, (TensorSpec("x", shape, "float32"),), ())


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Any]]:
    """Draw a shape, and steps that each know the shape that they start from."""
    sizes = st.sampled_from([1, 2, 3, 4, 6])
    shape = first = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    steps: list[Any] = []
    for _ in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["reshape", "permute", "take", "multiply", "expand"]))
        if kind == "reshape":
            shape = draw(dealt(math.prod(shape)))
            steps.append(lambda x, s=shape: relax.op.reshape(x, list(s)))
        elif kind == "permute":
            order = draw(st.permutations(range(len(shape))))
            shape = tuple(shape[axis] for axis in order)
            steps.append(lambda x, o=order: relax.op.permute_dims(x, list(o)))
        elif kind == "take" and len(shape) > 1:
            axis = draw(st.integers(0, len(shape) - 1))
            index = draw(st.integers(0, shape[axis] - 1))
            shape = shape[:axis] + shape[axis + 1 :]
            steps.append(
                lambda x, a=axis, i=index: relax.op.take(x, relax.const(i, "int64"), axis=a)
            )
        elif kind == "multiply":
            steps.append(lambda x: relax.op.multiply(x, relax.const(0.5, "float32")))
        else:
            axis = draw(st.integers(0, len(shape)))
            shape = (*shape[:axis], 1, *shape[axis:])
            steps.append(lambda x, a=axis: relax.op.expand_dims(x, a))
    return first, steps


@st.composite
def dealt(draw: st.DrawFn, elements: int) -> tuple[int, ...]:
    shape = []
    while elements > 1:
        size = draw(st.sampled_from([d for d in range(2, elements + 1) if elements % d == 0]))
        shape.append(size)
        elements //= size
    return tuple(shape) or (1,)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_a_chain_of_moves_computes_what_it_did(chain):
    shape, steps = chain
    model = model_of(shape, steps)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    once = follow_axes(model)
    np.testing.assert_array_equal(evaluate(once, x), evaluate(model, x))
    assert len(ops_of(once)) <= max(len(ops_of(model)), 4)
    again = follow_axes(sink_reshapes(once))
    np.testing.assert_array_equal(evaluate(again, x), evaluate(model, x))


def test_a_selection_from_stacked_features_is_a_slice_of_them():
    steps = [
        lambda x: relax.op.reshape(x, [5, 2, 3, 8]),
        lambda x: relax.op.permute_dims(x, [2, 0, 1, 3]),
        lambda x: relax.op.take(x, relax.const(1, "int64"), axis=0),
    ]
    assert ops_of(follow_axes(model_of((5, 2, 24), steps))) == ["strided_slice"]


def test_moves_that_undo_each_other_go():
    steps = [
        lambda x: relax.op.permute_dims(x, [1, 0, 2]),
        lambda x: relax.op.reshape(x, [15, 4]),
        lambda x: relax.op.multiply(x, relax.const(2.0, "float32")),
        lambda x: relax.op.reshape(x, [3, 5, 4]),
        lambda x: relax.op.permute_dims(x, [1, 0, 2]),
    ]
    assert ops_of(follow_axes(model_of((5, 3, 4), steps))) == ["multiply"]


def test_a_linear_layer_on_turned_rows_turns_its_result():
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("MatMul", ["t", "w"], ["a"]),
        node("Add", ["a", "b"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Transpose", ["r"], ["u"], perm=[1, 0, 2]),
        node("Add", ["x", "u"], ["y"]),
    ]
    weights = {"w": random(8, 8), "b": random(8, seed=1)}
    model = load(onnx_model(nodes, weights, {"x": (3, 5, 8)}))
    assert ops_of(model) == ["matmul", "add", "nn.relu", "add"]
    x = random(3, 5, 8, seed=2)
    want = x + np.maximum(x @ weights["w"] + weights["b"], 0)
    np.testing.assert_allclose(run_model(model, x)[0], want, rtol=1e-5, atol=1e-5)
