"""The vector functions keep the errors that their docstrings state, on every vector width."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from dense_support import target_of
from scipy.special import erf as exact_erf
from scipy.special import expit
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B
from tvm_sparse.schedules.x86 import vector_math

COUNT = 1 << 16
WIDTHS = [16, 8, 4, 1]

EXACT = {
    "exp": np.exp,
    "exp_nonpositive": np.exp,
    "erf": exact_erf,
    "tanh": np.tanh,
    "sigmoid": expit,
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + exact_erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def compiled(name, lanes):
    target = target_of(max(lanes, 4))
    with IRBuilder() as builder:
        with B.prim_func():
            B.func_name("kernel")
            B.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
            x = B.arg("x", B.Buffer((COUNT,), "float32"))
            y = B.arg("y", B.Buffer((COUNT,), "float32"))
            with B.serial(0, COUNT // lanes) as i:
                at = [i] if lanes == 1 else [B.ramp(i * lanes, 1, lanes)]
                B.buffer_store(y, getattr(vector_math, name)(x[at[0]], lanes), at)
    kernel = tvm.compile(builder.get(), target)["kernel"]

    def run(values):
        values = np.asarray(values, "float32")
        padded = np.zeros(-(-len(values) // COUNT) * COUNT, "float32")
        padded[: len(values)] = values
        out = np.empty_like(padded)
        for start in range(0, len(padded), COUNT):
            y = tvm.runtime.tensor(out[start : start + COUNT])
            kernel(tvm.runtime.tensor(padded[start : start + COUNT]), y)
            out[start : start + COUNT] = y.numpy()
        return out[: len(values)]

    return run


def grid(low, high):
    rng = np.random.default_rng(0)
    even = np.linspace(low, high, 4 * COUNT)
    tiny = rng.standard_normal(COUNT) * 10.0 ** rng.integers(-30, 1, COUNT)
    return np.concatenate([even, tiny[(tiny >= low) & (tiny <= high)]]).astype("float32")


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
@pytest.mark.parametrize("name", ["exp", "exp_nonpositive"])
def test_exp_is_within_two_units_in_the_last_place(name, width):
    x = grid(-87.3, 88.72 if name == "exp" else 0.0)
    got = compiled(name, width)(x).astype("float64")
    want = np.exp(x.astype("float64"))
    assert np.max(np.abs(got - want) / np.spacing(want.astype("float32"))) <= 2.0


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
def test_a_power_of_two_keeps_its_relative_error_and_ends_in_zero(width):
    x = grid(-126.0, 0.0)
    want = np.exp2(x.astype("float64"))
    assert np.all(np.abs(compiled("exp2_nonpositive", width)(x) - want) <= 1e-7 * want)
    behind = compiled("exp2_nonpositive", width)([-126.01, -150, -3e38, -np.inf, 0.0, np.nan])
    np.testing.assert_array_equal(behind, np.float32([0, 0, 0, 0, 1, np.nan]))


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
@pytest.mark.parametrize(
    ("name", "absolute", "relative"), [("erf", 1.2e-7, 3e-7), ("tanh", 1.5e-7, 4e-7)]
)
def test_odd_functions_keep_absolute_and_relative_error(name, absolute, relative, width):
    x = grid(-12.0, 12.0)
    error = np.abs(compiled(name, width)(x) - EXACT[name](x.astype("float64")))
    assert error.max() <= absolute
    assert np.all(error <= relative * np.abs(EXACT[name](x.astype("float64"))) + 2e-45)


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
@pytest.mark.parametrize(("name", "relative"), [("sigmoid", 4e-7), ("silu", 5e-7)])
def test_logistic_functions_keep_relative_error(name, relative, width):
    x = grid(-87.0, 88.0)
    want = EXACT[name](x.astype("float64"))
    assert np.all(np.abs(compiled(name, width)(x) - want) <= relative * np.abs(want) + 2e-45)


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
@pytest.mark.parametrize(("name", "bound"), [("gelu", 2e-7), ("gelu_tanh", 3e-7)])
def test_gelu_keeps_its_error(name, bound, width):
    x = grid(-200.0, 200.0)
    error = np.abs(compiled(name, width)(x) - EXACT[name](x.astype("float64")))
    assert np.all(error <= bound * np.maximum(1.0, np.abs(x)))


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
@pytest.mark.parametrize("name", sorted(EXACT))
def test_nan_stays_nan(name, width):
    assert np.isnan(compiled(name, width)([np.nan] * 17)).all()


@pytest.mark.parametrize("width", WIDTHS, ids="lanes{}".format)
@pytest.mark.parametrize(
    ("name", "x", "want"),
    [
        (
            "exp",
            [np.inf, -np.inf, 0.0, 89.0, -104.0, 3e38, -3e38],
            [np.inf, 0, 1, np.inf, 0, np.inf, 0],
        ),
        ("exp_nonpositive", [0.0, -np.inf, -3e38, -0.0], [1, 0, 0, 1]),
        ("erf", [np.inf, -np.inf, 0.0, 4.0, -3e38], [1, -1, 0, 1, -1]),
        ("tanh", [np.inf, -np.inf, 0.0, 10.0, -3e38], [1, -1, 0, 1, -1]),
        ("sigmoid", [np.inf, -np.inf, 0.0, -3e38], [1, 0, 0.5, 0]),
        ("silu", [np.inf, 0.0, 3e38, -3e38], [np.inf, 0, np.float32(3e38), 0]),
        ("gelu", [np.inf, 0.0, 3e38, -3e38], [np.inf, 0, np.float32(3e38), 0]),
        ("gelu_tanh", [np.inf, 0.0, 3e38, -3e38], [np.inf, 0, np.float32(3e38), 0]),
    ],
)
def test_special_values_are_exact(name, x, want, width):
    np.testing.assert_array_equal(compiled(name, width)(x), np.array(want, "float32"))


def test_denormal_results_of_exp_are_kept():
    x = np.linspace(-103.9, -87.4, 999).astype("float32")
    got = compiled("exp", 1)(x).astype("float64")
    assert np.max(np.abs(got - np.exp(x.astype("float64")))) <= 2.0**-149
