"""Whole modules, lowered and scheduled, agree with NumPy and leave no scalar libm calls."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from dense_support import machine, target_of
from scipy.special import erf, expit
from tvm import relax, tirx
from tvm.relax.backend.cpu_generic import pipeline as stock
from tvm_sparse.passes.lower_dense_ops import LowerDenseOps
from tvm_sparse.passes.schedule_rest import ScheduleRest

op = relax.op
LIBM = re.compile(r"@(llvm\.)?(exp|erf|tanh|pow)f?[.(]")


def scalar(value):
    return relax.const(value, "float32")


def module(build, *shapes):
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(build(builder.emit, *inputs))
        builder.emit_func_output(output)
    return builder.get()


def late_passes(lanes, threads):
    target = target_of(lanes)
    return tvm.transform.Sequential(
        [
            LowerDenseOps(machine(lanes, threads)),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            ScheduleRest(machine(lanes, threads)),
            relax.transform.DeadCodeElimination(),
            *stock.dataflow_lower_passes(target),
            *stock.finalize_passes(target),
        ]
    )


def run(mod, inputs, lanes=8, threads=1):
    pipeline = late_passes(lanes, threads)
    executable = tvm.compile(mod, target_of(lanes), relax_pipeline=pipeline)
    machine_ = relax.VirtualMachine(executable, tvm.cpu())
    result = machine_["main"](*[tvm.runtime.tensor(x) for x in inputs]).numpy()
    return result, executable.mod.imports[0].inspect_source("ll")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def attention(batch, length, heads, width):
    def build(emit, q, k, v, gamma, beta):
        def split(x):
            x = emit(op.reshape(x, (batch, length, heads, width)))
            return emit(op.permute_dims(x, [0, 2, 1, 3]))

        keys = emit(op.permute_dims(split(k), [0, 1, 3, 2]))
        scores = emit(op.divide(emit(op.matmul(split(q), keys)), scalar(width**0.5)))
        mixed = emit(op.matmul(emit(op.nn.softmax(scores, -1)), split(v)))
        mixed = emit(op.permute_dims(mixed, [0, 2, 1, 3]))
        mixed = emit(op.reshape(mixed, (batch, length, heads * width)))
        return emit(op.nn.gelu(emit(op.nn.layer_norm(emit(op.add(mixed, q)), gamma, beta, [-1]))))

    shape = (batch, length, heads * width)
    return module(build, shape, shape, shape, shape[2:], shape[2:])


def exact_attention(q, k, v, gamma, beta, heads):
    batch, length, hidden = q.shape

    def split(x):
        return x.astype("float64").reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)

    scores = split(q) @ split(k).transpose(0, 1, 3, 2) / np.sqrt(hidden / heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ split(v)).transpose(0, 2, 1, 3).reshape(q.shape) + q
    mixed = mixed - mixed.mean(-1, keepdims=True)
    y = mixed / np.sqrt((mixed**2).mean(-1, keepdims=True) + 1e-5) * gamma + beta
    return 0.5 * y * (1 + erf(y / np.sqrt(2)))


@pytest.mark.parametrize("lanes", [16, 8])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_attention_block_agrees_with_numpy(lanes, symbolic, threads):
    batch, length = (tirx.Var("b", "int64"), tirx.Var("s", "int64")) if symbolic else (2, 19)
    inputs = [normal(2, 19, 96, seed=i) for i in range(3)]
    inputs += [normal(96, seed=4), normal(96, seed=5)]
    got, _ = run(attention(batch, length, 3, 32), inputs, lanes, threads)
    np.testing.assert_allclose(got, exact_attention(*inputs, heads=3), atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 64, 56, 56), (1, 1, 1, 1), (3, 1, 1, 8)])
def test_a_chain_with_channel_factors_agrees_with_numpy(shape, threads):
    channels = (1, shape[1], 1, 1)

    def build(emit, x, a, b):
        y = emit(op.add(emit(op.multiply(x, a)), b))
        return emit(op.multiply(y, emit(op.sigmoid(y))))

    x, a, b = normal(*shape), normal(*channels, seed=1), normal(*channels, seed=2)
    got, _ = run(module(build, shape, channels, channels), [x, a, b], threads=threads)
    y = x.astype("float64") * a + b
    np.testing.assert_allclose(got, y * expit(y), atol=2e-6)


@pytest.mark.parametrize(
    ("build", "exact"),
    [
        (lambda e, x: e(op.erf(x)), erf),
        (lambda e, x: e(op.exp(x)), np.exp),
        (lambda e, x: e(op.tanh(x)), np.tanh),
        (lambda e, x: e(op.sigmoid(x)), expit),
        (lambda e, x: e(op.nn.gelu(x)), lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
        (lambda e, x: e(op.nn.silu(x)), lambda x: x * expit(x)),
        (lambda e, x: e(op.power(e(op.abs(x)), scalar(0.75))), lambda x: np.abs(x) ** 0.75),
        (lambda e, x: e(op.power(e(op.abs(x)), scalar(-1.5))), lambda x: np.abs(x) ** -1.5),
    ],
)
def test_no_elementary_function_is_left_to_libm(build, exact):
    x = normal(7, 65)
    got, code = run(module(build, x.shape), [x])
    np.testing.assert_allclose(got, exact(x.astype("float64")), rtol=1e-6, atol=3e-7)
    assert not LIBM.search(code)


def test_power_of_other_exponents_stays_exact():
    x = np.abs(normal(3, 17))
    got, code = run(module(lambda e, x: e(op.power(x, scalar(0.3))), x.shape), [x])
    assert LIBM.search(code)
    np.testing.assert_allclose(got, x.astype("float64") ** 0.3, rtol=1e-6)


@pytest.mark.parametrize("axes", [[0], [1], [0, 1], [0, 2], [1, 2]])
@pytest.mark.parametrize("threads", [1, 2])
def test_means_over_any_axes_agree_with_numpy(axes, threads):
    x = normal(6, 35, 48)
    got, _ = run(module(lambda e, x: e(op.mean(x, axes)), x.shape), [x], threads=threads)
    np.testing.assert_allclose(got, x.astype("float64").mean(tuple(axes)), atol=1e-5)


def test_softmax_over_another_axis_agrees_with_numpy():
    x = normal(2, 21, 5, 7)
    got, _ = run(module(lambda e, x: e(op.nn.softmax(x, 1)), x.shape), [x])
    e = np.exp(x.astype("float64") - x.max(1, keepdims=True))
    np.testing.assert_allclose(got, e / e.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "exact"),
    [
        (lambda e, x: e(op.concat([x, x], 1)), lambda x: np.concatenate([x, x], 1)),
        (lambda e, x: e(op.strided_slice(x, [1], [1], [4])), lambda x: x[:, 1:4]),
        (
            lambda e, x: e(op.nn.pad(x, [0, 0, 0, 0, 1, 2, 3, 4])),
            lambda x: np.pad(x, ((0, 0), (0, 0), (1, 2), (3, 4))),
        ),
        (lambda e, x: e(op.argmax(x, 1)), lambda x: x.argmax(1)),
    ],
)
def test_data_movement_is_exact(build, exact):
    x = normal(2, 5, 6, 7)
    got, _ = run(module(build, x.shape), [x])
    np.testing.assert_array_equal(got, exact(x))


def test_a_symbolic_chain_agrees_with_numpy():
    rows = tirx.Var("rows", "int64")

    def build(emit, x, b):
        return emit(op.nn.relu(emit(op.add(x, b))))

    x, b = normal(2, 13, 33), normal(33, seed=1)
    got, _ = run(module(build, (2, rows, 33), (33,)), [x, b], threads=2)
    np.testing.assert_array_equal(got, np.maximum(x + b, 0))
