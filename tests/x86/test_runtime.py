"""A compiled module takes what a user has in hand, and refuses in words what it cannot take."""

from __future__ import annotations

import json
import threading

import ml_dtypes
import numpy as np
import onnx
import pytest
import tvm
from deploy_support import (
    assert_pair,
    chain_module,
    pair_executable,
    pair_inputs,
    pair_manifest,
    pair_module,
    passing_module,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_sparse as ts
from tvm_sparse.deploy import wrap_executable
from tvm_sparse.errors import InputError, LibraryError
from tvm_sparse.model import TensorSpec
from tvm_sparse.report import LayerReport, Report
from tvm_sparse.runtime import ALIGNMENT, CompiledModule, aligned_empty, check_inputs


@pytest.fixture(scope="module")
def module() -> CompiledModule:
    return pair_module()


def misaligned(array: np.ndarray, offset: int) -> np.ndarray:
    raw = np.zeros(array.nbytes + 2 * ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT + offset
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = {
    "plain": np.array,
    "misaligned by 4 bytes": lambda a: misaligned(a, 4),
    "misaligned by 1 byte": lambda a: misaligned(a, 1),
    "column-major": np.asfortranarray,
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "big-endian": lambda a: a.astype(">f4"),
    "read-only": read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_gives_the_right_numbers(module: CompiledModule, layout: str) -> None:
    x, z = (LAYOUTS[layout](array) for array in pair_inputs(5))
    assert_pair(module(x, z), x, z)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 100))
def test_the_symbolic_batch_may_be_anything(batch: int, seed: int) -> None:
    x, z = pair_inputs(batch, seed)
    assert_pair(pair_module()(x, z), x, z)


def test_run_goes_by_name_in_any_order(module: CompiledModule) -> None:
    x, z = pair_inputs()
    outputs = module.run({"z/0": z, "x": x})
    assert list(outputs) == ["y", "twice"]
    assert_pair(outputs.values(), x, z)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["x"], "misses 'z/0'; its inputs are 'x', 'z/0'"),
        (["x", "z/0", "q"], "does not know 'q'"),
        (["x", "z"], "does not know 'z' and misses 'z/0'"),
        ([], "misses 'x', 'z/0'"),
    ],
)
def test_wrong_names_are_named(module: CompiledModule, names: list[str], sentence: str) -> None:
    x, _ = pair_inputs()
    with pytest.raises(InputError, match=sentence):
        module.run(dict.fromkeys(names, x))


def test_a_wrong_count_of_inputs_names_the_inputs(module: CompiledModule) -> None:
    with pytest.raises(InputError, match=r"takes 2 inputs \(x, z/0\), and the call gives 1"):
        module(pair_inputs()[0])


@pytest.mark.parametrize(
    ("x", "z", "sentence"),
    [
        ((3, 8), (2, 5), "'batch' is 3 in input 'x' and 2 here"),
        ((3, 9), (3, 5), r"'x' has shape \(3, 9\), and the model wants \(batch, 8\)"),
        ((3, 8, 1), (3, 5), r"'x' has 3 dimensions, \(3, 8, 1\); the model wants \(batch, 8\)"),
        ((8,), (3, 5), "'x' has 1 dimension, "),
        ((0, 8), (3, 5), "'batch' is 0 in input 'x' and 3 here"),
    ],
)
def test_a_wrong_shape_says_which_dimension(
    module: CompiledModule, x: tuple[int, ...], z: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        module(np.zeros(x, np.float32), np.zeros(z, np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool", "complex64"])
def test_a_wrong_type_is_never_cast_in_silence(module: CompiledModule, dtype: str) -> None:
    x, z = pair_inputs()
    with pytest.raises(InputError, match=rf"'x' is {dtype}, and the model wants float32"):
        module(x.astype(dtype), z)


def test_bfloat16_goes_in_and_comes_out() -> None:
    graph = onnx.parser.parse_graph("g (bfloat16[4,6] x) => (bfloat16[6,4] y) { y = Transpose(x) }")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    module = ts.compile(model, threads=1, check=False)
    x = np.arange(24).reshape(4, 6).astype(ml_dtypes.bfloat16)
    got = module(x)
    assert got.dtype == ml_dtypes.bfloat16
    assert np.array_equal(got, x.T)
    assert np.array_equal(module(np.asfortranarray(x)), x.T)
    # What other packages call by this name comes through DLPack.
    assert np.array_equal(module(tvm.runtime.tensor(x)), x.T)
    with pytest.raises(InputError, match=r"wants bfloat16: convert it with .astype\(ml_dtypes"):
        module(x.astype(np.float32))


@pytest.mark.parametrize("value", [[[1.0] * 8], 3.0, None, "x"])
def test_what_is_no_array_is_refused(module: CompiledModule, value: object) -> None:
    with pytest.raises(InputError, match=f"of type {type(value).__name__}; give a NumPy array"):
        module(value, pair_inputs()[1])


@pytest.mark.torch
def test_torch_tensors_are_taken(module: CompiledModule) -> None:
    torch = pytest.importorskip("torch")
    x, z = (torch.from_numpy(array) for array in pair_inputs())
    assert_pair(module(x, z), x, z)
    assert_pair(module(x.t().contiguous().t(), z), x, z)
    with pytest.raises(InputError, match="'x' cannot be read through DLPack"):
        module(x.requires_grad_(), z)


class OnAnotherDevice:
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("nobody should ask for the data")


def test_a_tensor_on_another_device_is_refused(module: CompiledModule) -> None:
    with pytest.raises(InputError, match="'x' lies on another device; copy it to the CPU"):
        module(OnAnotherDevice(), pair_inputs()[1])


def test_outputs_survive_the_next_call(module: CompiledModule) -> None:
    x, z = pair_inputs(seed=1)
    first = module(x, z)
    kept = [array.copy() for array in first]
    for seed in range(2, 6):
        module(*pair_inputs(seed=seed))
    for array, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_outputs_belong_to_the_caller() -> None:
    module = passing_module()
    x, flag = aligned_empty((4,), np.float32), np.array([True, False])
    x[:] = [1, 2, 3, 4]
    same, constant, turned = module(x, flag)
    np.testing.assert_array_equal(turned, [False, True])
    assert turned.dtype == np.bool_
    same += 1
    constant += 1
    np.testing.assert_array_equal(x, [1, 2, 3, 4])
    np.testing.assert_array_equal(module(x, flag)[1], [0, 1, 2])


def test_inputs_are_left_alone(module: CompiledModule) -> None:
    x, z = pair_inputs()
    before = x.copy(), z.copy()
    module(x, z)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(z, before[1])


def test_calls_from_many_threads_do_not_mix(module: CompiledModule) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        x, z = pair_inputs(1 + seed, seed)
        try:
            for _ in range(50):
                assert_pair(module(x, z), x, z)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


def test_the_module_shows_its_signature(module: CompiledModule) -> None:
    threads = "1 thread" if module.threads == 1 else f"{module.threads} threads"
    assert repr(module) == (
        "CompiledModule(x: float32 (batch, 8), z/0: float32 (batch, 5) -> "
        f"y: float32 (batch, 5), twice: float32 (batch, 5); {threads})"
    )
    assert [spec.name for spec in module.inputs] == ["x", "z/0"]
    assert [spec.name for spec in module.outputs] == ["y", "twice"]


def test_a_profile_finds_the_layer_of_a_kernel(module: CompiledModule) -> None:
    profile = module.profile(*pair_inputs(), repeats=3)
    (row,) = [row for row in profile.kernels if row.symbol == "fused_matmul_relu_add"]
    assert row.layers == ("fc",) and row.calls == 1 and row.microseconds > 0
    assert profile.layers == {"fc": row.microseconds}
    assert profile.total_microseconds > 0
    assert "fused_matmul_relu_add (fc)" in str(profile)
    x, z = pair_inputs()
    assert_pair(module(x, z), x, z)


def test_a_profile_takes_inputs_by_name_too(module: CompiledModule) -> None:
    x, z = pair_inputs()
    assert module.profile({"x": x, "z/0": z}, repeats=1).layers.keys() == {"fc"}
    with pytest.raises(InputError, match="one repeat or more"):
        module.profile(x, z, repeats=0)


def test_a_shared_kernel_is_told_apart_by_its_calls() -> None:
    x = np.ones((4, 8), np.float32)
    module = chain_module(kernels={"matmul": ("first", "second")})
    np.testing.assert_array_equal(module(x), np.full((4, 8), 64, np.float32))
    profile = module.profile(x, repeats=2)
    (row,) = [row for row in profile.kernels if row.layers]
    assert row.calls == 2 and profile.layers.keys() == {"first", "second"}
    assert sum(profile.layers.values()) == pytest.approx(row.microseconds)


def test_a_time_is_not_guessed_when_calls_and_names_do_not_match() -> None:
    module = chain_module(kernels={"matmul": ("a", "b", "c")})
    assert module.profile(np.ones((4, 8), np.float32), repeats=1).layers == {}


def test_measured_times_stand_in_the_report() -> None:
    layers = (LayerReport("fc", "matmul", (5, 8)), LayerReport("other", "matmul", (5, 8)))
    report = json.loads(Report("model.onnx", layers=layers).to_json())
    module = pair_module(report=report)
    assert module.report.layers[0].measured_us is None
    profile = module.profile(*pair_inputs(), repeats=1)
    assert profile.report is not None
    fc, other = profile.report.layers
    assert fc.measured_us == profile.layers["fc"] and other.measured_us is None


def test_a_module_without_a_report_says_so(module: CompiledModule) -> None:
    with pytest.raises(LibraryError, match="without a report"):
        _ = module.report


def test_threads_must_be_at_least_one() -> None:
    with pytest.raises(InputError, match="one thread or more, not on 0"):
        wrap_executable(pair_executable(), pair_manifest(), threads=0)


def test_a_module_without_an_exporter_says_so() -> None:
    bare = CompiledModule(pair_executable().jit(), pair_manifest())
    with pytest.raises(LibraryError, match="cannot be exported"):
        bare.export("model.so")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.sampled_from(["float32", "int64", "bool", "uint8", "float64"]),
)
def test_an_aligned_array_starts_on_its_boundary(shape: tuple[int, ...], dtype: str) -> None:
    array = aligned_empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype
    assert array.ctypes.data % ALIGNMENT == 0 or array.size == 0
    assert array.flags.c_contiguous and array.flags.writeable


def test_symbolic_sizes_are_handed_back() -> None:
    specs = [TensorSpec("a", ("n", "m", 2), "float32"), TensorSpec("b", ("m",), "int64")]
    arrays = [np.zeros((3, 4, 2), np.float32), np.zeros(4, np.int64)]
    assert check_inputs(specs, arrays) == {"n": 3, "m": 4}


def test_a_scalar_input_has_no_dimensions() -> None:
    assert check_inputs([TensorSpec("s", (), "float32")], [np.zeros((), np.float32)]) == {}
