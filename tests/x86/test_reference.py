"""The dense reference computes what it should, and captures what each weighted layer saw."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.check import check_layers, check_outputs, compare, dot_bound, model_tolerance
from tvm_sparse.errors import CheckError, InputError
from tvm_sparse.float64 import ConvAttributes, conv2d64, matmul64
from tvm_sparse.model import Model, TensorSpec
from tvm_sparse.reference import (
    Capture,
    Reference,
    random_inputs,
)


def model_of(
    inputs: list[TensorSpec], params: dict[str, np.ndarray], body: Any, outputs: int = 1
) -> Model:
    """Build a model whose body gets the block builder, the inputs and the weights as variables."""
    from tvm import relax, tirx

    sizes: dict[str, Any] = {}
    for spec in inputs:
        for dim in spec.shape:
            if isinstance(dim, str):
                sizes.setdefault(dim, tirx.Var(dim, "int64"))

    def variable(name: str, shape: tuple[int | str, ...], dtype: str) -> Any:
        dims = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
        return relax.Var(name, relax.TensorType(dims, dtype))

    bb = relax.BlockBuilder()
    xs = [variable(spec.name, spec.shape, spec.dtype) for spec in inputs]
    ws = {name: variable(name, value.shape, str(value.dtype)) for name, value in params.items()}
    with bb.function("main", [*xs, *ws.values()], attrs={"num_input": len(xs)}):
        with bb.dataflow():
            out = bb.emit_output(body(bb, *xs, **ws))
        bb.emit_func_output(out)
    names = tuple(TensorSpec(f"out{i}", (), "float32") for i in range(outputs))
    return Model(bb.get(), params, {}, tuple(inputs), names)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_within(got: np.ndarray, capture: Any) -> None:
    y, magnitude = capture.reference64()
    check_layers([compare(capture.name, got, y, dot_bound(magnitude, capture.terms))])


def perceptron(batch: int | str = "batch") -> Model:
    from tvm import relax

    def body(bb: Any, x: Any, w1: Any, b1: Any, w2: Any) -> Any:
        h = bb.emit(relax.op.matmul(x, w1), "fc1")
        h = bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(h, b1))))
        return bb.emit(relax.op.tanh(bb.emit(relax.op.matmul(h, w2), "fc2")))

    weights = {"w1": normal(8, 16), "b1": normal(16, seed=1), "w2": normal(16, 4, seed=2)}
    return model_of([TensorSpec("x", (batch, 8), "float32")], weights, body)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_perceptron_with_a_symbolic_batch(batch: int) -> None:
    model = perceptron()
    reference = Reference(model)
    (x,) = random_inputs(model, symbolic={"batch": batch})
    run = reference.run([x])
    w1, b1, w2 = (model.params[name].astype(np.float64) for name in ("w1", "b1", "w2"))
    h = np.maximum(x @ w1 + b1, 0)
    check_outputs(["y"], run.outputs, [np.tanh(h @ w2)], model_tolerance(2))
    assert list(run.captures) == ["fc1", "fc2"] == list(reference.layers)
    np.testing.assert_array_equal(run.captures["fc1"].x, x)
    assert run.captures["fc2"].param == "w2"
    np.testing.assert_allclose(run.captures["fc2"].x, h, rtol=1e-5, atol=1e-5)
    for capture in run.captures.values():
        assert_within(capture.result, capture)


def test_captures_of_one_run_survive_the_next() -> None:
    model = perceptron(3)
    reference = Reference(model)
    first = reference.run(random_inputs(model, seed=1))
    kept = {name: capture.x.copy() for name, capture in first.captures.items()}
    second = reference.run(random_inputs(model, seed=2))
    for name, x in kept.items():
        np.testing.assert_array_equal(first.captures[name].x, x)
        assert not np.array_equal(second.captures[name].x, x)


def test_a_run_without_captures_keeps_nothing() -> None:
    model = perceptron(3)
    assert Reference(model).run(random_inputs(model), capture=False).captures == {}


def test_the_model_is_left_as_it_was() -> None:
    import tvm

    model = perceptron()
    before = tvm.IRModule(dict(model.mod.functions_items()))
    digest = model.digest()
    Reference(model).run(random_inputs(model))
    tvm.ir.assert_structural_equal(model.mod, before)
    assert model.digest() == digest


def test_a_reference_leaves_no_function_behind() -> None:
    import tvm_ffi

    def ours() -> list[str]:
        names = tvm_ffi.registry.list_global_func_names()
        return [name for name in names if name.startswith("tvm_sparse.reference")]

    before = ours()
    reference = Reference(perceptron(2))
    assert len(ours()) == len(before) + 1
    del reference
    gc.collect()
    assert ours() == before


def test_wrong_inputs_are_refused() -> None:
    reference = Reference(perceptron())
    with pytest.raises(InputError, match="takes 1 input, and the call gives 0"):
        reference.run([])
    with pytest.raises(InputError, match="wants float32"):
        reference.run([np.zeros((2, 8))])


def test_what_is_no_weight_stays_with_tvm() -> None:
    from tvm import relax

    def body(bb: Any, x: Any, scale: Any) -> Any:
        scores = bb.emit(relax.op.matmul(x, bb.emit(relax.op.permute_dims(x, [0, 2, 1]))), "scores")
        return bb.emit(relax.op.multiply(scores, scale))

    model = model_of([TensorSpec("x", (2, 5, 3), "float32")], {"scale": normal(1)}, body)
    reference = Reference(model)
    (x,) = random_inputs(model)
    run = reference.run([x])
    assert reference.layers == ()
    want = (x.astype(np.float64) @ x.transpose(0, 2, 1)) * model.params["scale"]
    check_outputs(["y"], run.outputs, [want], model_tolerance(1))


def test_layers_of_the_same_name_are_told_apart() -> None:
    from tvm import relax

    def body(bb: Any, x: Any, w: Any) -> Any:
        h = bb.emit(relax.op.matmul(x, w), "fc")
        return bb.emit(relax.op.matmul(h, w), "fc")

    model = model_of([TensorSpec("x", (2, 4), "float32")], {"w": normal(4, 4)}, body)
    reference = Reference(model)
    assert len(reference.layers) == 2 == len(set(reference.layers))
    assert len(reference.run(random_inputs(model)).captures) == 2


CONVS = [
    ((1, 3, 9, 7), (5, 3, 3, 3), {}),
    ((2, 4, 8, 8), (6, 4, 1, 1), {"strides": (2, 2)}),
    ((1, 4, 11, 6), (4, 4, 3, 2), {"padding": (1, 0, 2, 1), "dilation": (2, 1)}),
    ((2, 6, 7, 7), (6, 1, 3, 3), {"groups": 6, "padding": (1, 1, 1, 1)}),
    ((1, 6, 7, 9), (12, 2, 3, 3), {"groups": 3, "strides": (1, 2), "padding": (0, 1, 0, 1)}),
    ((1, 1, 1, 1), (1, 1, 1, 1), {}),
]


@pytest.mark.parametrize(("shape", "kernel", "options"), CONVS)
def test_a_convolution_agrees_with_tvm(
    shape: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any]
) -> None:
    import tvm
    from tvm import relax

    def body(bb: Any, x: Any, w: Any) -> Any:
        return bb.emit(relax.op.nn.conv2d(x, w, **options), "conv")

    model = model_of([TensorSpec("x", shape, "float32")], {"w": normal(*kernel)}, body)
    (x,) = random_inputs(model)
    run = Reference(model).run([x])
    stock = tvm.compile(model.mod, tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"}))
    machine = relax.VirtualMachine(stock, tvm.cpu())
    values = [tvm.runtime.tensor(value) for value in (x, model.params["w"])]
    got = machine["main"](*values).numpy()
    capture = run.captures["conv"]
    assert capture.conv == ConvAttributes(**options)
    assert_within(got, capture)
    assert_within(run.outputs[0], capture)


@pytest.mark.parametrize(("shape", "kernel", "options"), CONVS)
def test_some_rows_are_the_rows_of_all(
    shape: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any]
) -> None:
    x, w = normal(*shape), normal(*kernel, seed=1)
    conv = ConvAttributes(**options)
    capture = Capture("c", "w", x, w, conv2d64(x, w, conv), conv)
    rows = [kernel[0] - 1, 0]
    for some, every in zip(capture.reference64(rows), capture.reference64(), strict=True):
        np.testing.assert_allclose(some, every[:, rows], rtol=1e-12)


def test_some_columns_of_a_matmul_are_the_columns_of_all() -> None:
    x, w = normal(2, 3, 7), normal(7, 5, seed=1)
    w[:, 2] = 0
    capture = Capture("c", "w", x, w, matmul64(x, w))
    for some, every in zip(capture.reference64([4, 0]), capture.reference64(), strict=True):
        np.testing.assert_allclose(some, every[..., [4, 0]], rtol=1e-12)
    np.testing.assert_array_equal(capture.terms, [7, 7, 0, 7, 7])
    assert capture.result.dtype == np.float32


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_conv2d64_is_the_sum_over_taps(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]))
    per_group, out_per_group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    strides = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 4))
    x = normal(data.draw(st.integers(1, 2)), groups * per_group, 7, 6, seed=1)
    w = normal(groups * out_per_group, per_group, *kernel)
    got = conv2d64(x, w, ConvAttributes(strides, padding, dilation, groups))
    top, left, bottom, right = padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    for o, i, j in np.ndindex(w.shape[0], *got.shape[2:]):
        first = o // out_per_group * per_group
        patch = padded[
            :,
            first : first + per_group,
            i * strides[0] : i * strides[0] + kernel[0] * dilation[0] : dilation[0],
            j * strides[1] : j * strides[1] + kernel[1] * dilation[1] : dilation[1],
        ]
        patch = patch[:, :, : kernel[0], : kernel[1]]
        np.testing.assert_allclose(got[:, o, i, j], (patch * w[o]).sum((1, 2, 3)), atol=1e-12)


@pytest.mark.parametrize(
    ("x", "w"),
    [((7,), (7, 3)), ((2, 7), (7, 3)), ((2, 5, 7), (7, 1)), ((4, 2, 7), (4, 7, 3)), ((2, 7), (7,))],
)
def test_matmul64_takes_every_rank(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    a, b = normal(*x), normal(*w, seed=1)
    np.testing.assert_allclose(matmul64(a, b), a.astype(np.float64) @ b, rtol=1e-12, atol=1e-12)


def test_wide_weights_are_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm_sparse import float64

    x, w = normal(3, 16), normal(16, 29, seed=1)
    image, kernel = normal(1, 4, 9, 9), normal(3, 4, 3, 3, seed=1)
    whole = matmul64(x, w), conv2d64(image, kernel, ConvAttributes())
    monkeypatch.setattr(float64, "_PIECE_BYTES", 1000)
    np.testing.assert_allclose(matmul64(x, w), whole[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        conv2d64(image, kernel, ConvAttributes()), whole[1], rtol=1e-12, atol=1e-13
    )


def test_random_inputs_are_valid_for_embeddings_and_masks() -> None:
    specs = (
        TensorSpec("ids", ("batch", "seq"), "int64"),
        TensorSpec("mask", ("batch", "seq"), "bool"),
        TensorSpec("pixels", ("batch", 3), "float32"),
        TensorSpec("half", ("seq",), "float16"),
        TensorSpec("past", ("past+seq", "2*batch"), "uint8"),
        TensorSpec("odd", ("batch size",), "int32"),
    )
    model = Model(None, {}, {}, specs, ())
    values = dict(zip([s.name for s in specs], random_inputs(model), strict=True))
    batch, seq = values["ids"].shape
    assert batch != seq and min(batch, seq) > 1
    assert values["mask"].shape == (batch, seq) and values["pixels"].shape == (batch, 3)
    past = values["past"].shape[0] - seq
    assert values["past"].shape == (past + seq, 2 * batch) and past not in (batch, seq)
    for spec in specs:
        assert values[spec.name].dtype == spec.dtype
        if values[spec.name].dtype.kind in "iu":
            assert set(np.unique(values[spec.name])) <= {0, 1}
    again = random_inputs(model)
    for value, same in zip(values.values(), again, strict=True):
        np.testing.assert_array_equal(value, same)
    assert random_inputs(model, symbolic={"batch": 64})[0].shape[0] == 64
    assert not np.array_equal(random_inputs(model, seed=1)[2], values["pixels"])


# What check.py promises.


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e15]),
    st.integers(0, 1000),
)
def test_every_order_of_summation_stays_within_the_bound(
    terms: int, zeros: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((6, terms)).astype(np.float32)
    w[rng.random(w.shape) < zeros] = 0
    x = (rng.standard_normal((terms, 4)) * scale).astype(np.float32)
    magnitude = np.abs(w).astype(np.float64) @ np.abs(x)
    bound = dot_bound(magnitude, np.count_nonzero(w, axis=1)[:, None])
    want = w.astype(np.float64) @ x
    order = rng.permutation(terms)
    serial = np.zeros((6, 4), np.float32)
    for k in order:
        serial += w[:, k, None] * x[k]
    check_layers([compare("serial", serial, want, bound), compare("blas", w @ x, want, bound)])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.integers(0, 100))
def test_a_lost_weight_is_outside_the_bound(terms: int, seed: int) -> None:
    w, x = normal(3, terms, seed=seed), normal(terms, 8, seed=seed + 1)
    want = w.astype(np.float64) @ x
    lost = w.copy()
    lost[1, np.argmax(np.abs(w[1]))] = 0
    check = compare(
        "fc", lost @ x, want, dot_bound(np.abs(w).astype(np.float64) @ np.abs(x), terms)
    )
    assert not check.ok and check.max_ratio > 10
    with pytest.raises(CheckError, match="layer 'fc' disagrees with the dense"):
        check_layers([check])


def test_an_exact_result_is_within_a_bound_of_zero() -> None:
    zero = np.zeros((2, 2))
    assert compare("w", zero.astype(np.float32), zero, zero).max_ratio == 0
    assert compare("w", np.full((2, 2), 1e-40, np.float32), zero, zero).max_ratio == np.inf


@pytest.mark.parametrize(
    ("got", "want", "ok"),
    [
        (np.nan, np.nan, True),
        (np.inf, np.inf, True),
        (-np.inf, np.inf, False),
        (np.nan, 1.0, False),
        (1.0, np.nan, False),
        (np.inf, np.nan, False),
        (np.inf, 1e39, True),
        (np.inf, 1e30, False),
        (-np.inf, 1e39, False),
    ],
)
def test_nan_and_inf_must_coincide(got: float, want: float, ok: bool) -> None:
    check = compare("fc", np.float32([got, 1]), np.array([want, 1]), np.array(1e-6))
    assert check.ok == ok


def test_the_worst_layer_is_named() -> None:
    good = compare("a", np.float32([1]), np.array([1.0]), np.array(1e-6))
    bad = compare("b", np.float32([1.1]), np.array([1.0]), np.array(1e-6))
    worse = compare("c", np.float32([9]), np.array([1.0]), np.array(1e-6))
    with pytest.raises(CheckError, match=r"layer 'c' .* \(2 of 3 layers are outside theirs\)"):
        check_layers([good, bad, worse])
    with pytest.raises(CheckError, match=r"output 'y' .* worst layer is 'c'"):
        check_outputs(
            ["y"], [np.float32([2])], [np.float32([1])], model_tolerance(1), [good, bad, worse]
        )


@pytest.mark.parametrize("depth", [1, 12, 100])
def test_outputs_may_differ_by_roundings_and_no_more(depth: int) -> None:
    want = normal(1000)
    noise = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    near = want + np.float32(1e-6 * depth) * noise
    far = want + np.float32(1e-4 * depth) * noise
    assert check_outputs(["y"], [near], [want], model_tolerance(depth))[0].ok
    with pytest.raises(CheckError, match="output 'y' disagrees"):
        check_outputs(["y"], [far], [want], model_tolerance(depth))


def test_one_wrong_element_among_many_is_noticed() -> None:
    want = normal(100_000)
    got = want.copy()
    got[777] += 0.01
    with pytest.raises(CheckError, match=r"largest error 0\.01 "):
        check_outputs(["y"], [got], [want], model_tolerance(1))


def test_integers_must_be_equal() -> None:
    want = np.arange(5)
    assert check_outputs(["ids"], [want.copy()], [want], model_tolerance(10))[0].max_error == 0
    with pytest.raises(CheckError, match="output 'ids'"):
        check_outputs(["ids"], [want + (want == 3)], [want], model_tolerance(10))


def test_a_shape_that_differs_is_a_sentence() -> None:
    with pytest.raises(CheckError, match=r"'y' has shape \(2,\), and the reference \(3,\)"):
        check_outputs(["y"], [np.zeros(2)], [np.zeros(3)], model_tolerance(1))
    with pytest.raises(CheckError, match="has 0 outputs, and the reference 1"):
        check_outputs(["y"], [], [np.zeros(3)], model_tolerance(1))
