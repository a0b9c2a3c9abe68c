"""The float64 reference of epilogues bounds what float32 may differ by, operation by operation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from tvm_sparse.schedules.epilogue import EMITTERS

from tvm_sparse.epilogue_reference import REFERENCES, evaluate64
from tvm_sparse.workload import Epilogue, EpilogueOp, EpilogueRef

ACC, CHANNEL, TENSOR = EpilogueRef("acc"), EpilogueRef("channel", 0), EpilogueRef("tensor", 0)
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum")
F = np.float32


def sigmoid(x):
    return F(1) / (F(1) + np.exp(-x))


# Straightforward float32 evaluations, each operation rounded as a processor rounds it.
FLOAT32 = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "negative": lambda a: -a,
    "abs": np.abs,
    "sqrt": lambda a: np.sqrt(a),
    "exp": np.exp,
    "erf": lambda a: erf(a).astype(F),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "silu": lambda a: a * sigmoid(a),
    "gelu": lambda a: F(0.5) * a * (F(1) + erf(a * F(np.sqrt(0.5))).astype(F)),
    "gelu_tanh": lambda a: (
        F(0.5) * a * (F(1) + np.tanh(F(np.sqrt(2 / np.pi)) * (a + F(0.044715) * a * a * a)))
    ),
}


def test_every_operation_that_kernels_emit_has_a_reference():
    assert set(REFERENCES) == set(EMITTERS) == set(FLOAT32)


def draw(seed, scale):
    """Draw an exact result, what float32 made of it, and the bound of that."""
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal(256) * scale
    error = rng.uniform(0, 1e-5, 256) * np.abs(exact)
    rounded = (exact + rng.uniform(-1, 1, 256) * error).astype(F)
    return exact, rounded, np.maximum(error, np.abs(rounded - exact)), rng


@pytest.mark.parametrize("name", sorted(FLOAT32))
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 0.3, 1.0, 8.0]))
def test_float32_stays_within_the_bound_of_each_operation(name, seed, scale):
    exact, rounded, bound, rng = draw(seed, scale)
    if name == "sqrt":
        exact, rounded = np.abs(exact), np.abs(rounded)
    if name in BINARY:
        other = (rng.standard_normal(256) * 2 + np.sign(rng.standard_normal(256))).astype(F)
        other[other == 0] = 1
        epilogue, channels = Epilogue((EpilogueOp(name, (ACC, CHANNEL)),), channels=1), [other]
        got = FLOAT32[name](rounded, other)
    else:
        epilogue, channels = Epilogue((EpilogueOp(name, (ACC,)),)), []
        got = FLOAT32[name](rounded)
    value, allowed = evaluate64(epilogue, exact, bound, channels, [])
    assert got.dtype == F
    off = np.abs(got - value) > allowed
    assert not off.any(), (exact[off], got[off], value[off], allowed[off])


@pytest.mark.parametrize("name", sorted(FLOAT32))
def test_the_bound_is_no_licence_for_wrong_results(name):
    exact, _, bound, _ = draw(0, 1.0)
    exact = np.abs(exact) + 0.1
    inputs = (ACC, CHANNEL) if name in BINARY else (ACC,)
    epilogue = Epilogue((EpilogueOp(name, inputs),), channels=len(inputs) - 1)
    value, allowed = evaluate64(epilogue, exact, bound, [np.full(256, 0.7, F)], [])
    assert np.all(allowed < 1e-4 * (1 + np.abs(value)))


def chain(*names):
    """Each operation on the last one's result; binary ones take a channel or a tensor too."""
    ops, last = [], ACC
    for index, name in enumerate(names):
        second = (CHANNEL, TENSOR)[index % 2]
        ops.append(EpilogueOp(name, (last, second) if name in BINARY else (last,)))
        last = EpilogueRef("node", index)
    return Epilogue(tuple(ops), channels=1, tensors=1)


STEPS = ["add", "multiply", "maximum", "gelu", "silu", "tanh", "sigmoid", "abs", "subtract"]


@settings(max_examples=60)
@given(names=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_float32_stays_within_the_bound_of_whole_chains(names, seed):
    exact, rounded, bound, rng = draw(seed, 1.0)
    channel, tensor = (rng.standard_normal(256).astype(F) for _ in range(2))
    got = rounded
    for index, name in enumerate(names):
        second = (channel, tensor)[index % 2]
        got = FLOAT32[name](got, second) if name in BINARY else FLOAT32[name](got)
    value, allowed = evaluate64(chain(*names), exact, bound, [channel], [tensor])
    assert np.all(np.abs(got - value) <= allowed)


def test_a_result_that_is_used_twice_is_evaluated_once_and_right():
    # x * (x + 1), with x = acc * 2
    two, one = EpilogueRef("scalar", value=2.0), EpilogueRef("scalar", value=1.0)
    x = EpilogueRef("node", 0)
    epilogue = Epilogue(
        (
            EpilogueOp("multiply", (ACC, two)),
            EpilogueOp("add", (x, one)),
            EpilogueOp("multiply", (x, EpilogueRef("node", 1))),
        )
    )
    acc = np.array([0.5, -3.0])
    value, bound = evaluate64(epilogue, acc, np.zeros(2), [], [])
    np.testing.assert_array_equal(value, (2 * acc) * (2 * acc + 1))
    assert np.all(bound > 0)


def test_without_operations_nothing_changes():
    acc, bound = np.array([1.0, np.nan]), np.array([0.1, 0.2])
    value, same = evaluate64(Epilogue(), acc, bound, [], [])
    assert value is acc
    assert same is bound


@pytest.mark.parametrize(("divisor", "finite"), [(1e-3, True), (1e-7, False)])
def test_division_by_what_may_be_zero_has_no_bound(divisor, finite):
    epilogue = Epilogue((EpilogueOp("divide", (CHANNEL, ACC)),), channels=1)
    _, bound = evaluate64(epilogue, np.array([divisor]), np.array([1e-6]), [np.ones(1, F)], [])
    assert np.isfinite(bound[0]) == finite
