"""Requests of the Open Inference Protocol: what is right is read, what is wrong gets a sentence."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_sparse.errors import InputError
from tvm_sparse.model import TensorSpec
from tvm_sparse.serving.datatypes import DATATYPES, datatype_of, element_type
from tvm_sparse.serving.protocol import (
    InferRequest,
    WantedOutput,
    describe_model,
    read_request,
    write_answer,
)

INPUTS = (TensorSpec("x", ("batch", 3), "float32"), TensorSpec("n", ("batch",), "int64"))
OUTPUTS = (TensorSpec("y", ("batch", 3), "float32"), TensorSpec("z", ("batch",), "int64"))

X = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2.5, 3, 4, 5, 6]}
N = {"name": "n", "shape": [2], "datatype": "INT64", "data": [7, 8]}


def body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def read(text: bytes, header_length: int | None = None, **max_sizes: int) -> InferRequest:
    return read_request(text, header_length, INPUTS, OUTPUTS, max_sizes)


def binary(entry: dict[str, Any], size: int) -> dict[str, Any]:
    described = {key: value for key, value in entry.items() if key != "data"}
    return {**described, "parameters": {"binary_data_size": size}}


def one(dtype: str, data: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Read one input in JSON, of a model that takes it."""
    specs = (TensorSpec("a", shape, dtype),)
    entry = {"name": "a", "shape": list(shape), "datatype": datatype_of(dtype), "data": data}
    return np.asarray(read_request(body(entry), None, specs, OUTPUTS, {}).inputs["a"])


def test_flat_and_nested_lists_say_the_same() -> None:
    nested = {**X, "data": [[1, 2.5, 3], [4, 5, 6]]}
    for entry in (X, nested):
        request = read(body(entry, N, id="a"))
        assert request.id == "a"
        np.testing.assert_array_equal(request.inputs["x"], [[1, 2.5, 3], [4, 5, 6]])
        assert request.inputs["x"].dtype == np.float32
        np.testing.assert_array_equal(request.inputs["n"], [7, 8])
        assert request.outputs == (WantedOutput("y", False), WantedOutput("z", False))


def test_binary_tensors_follow_the_json_in_the_order_of_the_inputs() -> None:
    x, n = np.arange(6, dtype="<f4").reshape(2, 3), np.array([2**40, -1], "<i8")
    head = body(binary(N, 16), binary(X, 24))
    request = read(head + n.tobytes() + x.tobytes(), len(head))
    np.testing.assert_array_equal(request.inputs["x"], x)
    np.testing.assert_array_equal(request.inputs["n"], n)


def test_json_and_binary_inputs_may_be_mixed() -> None:
    x = np.arange(6, dtype="<f4").reshape(2, 3)
    head = body(binary(X, 24), N)
    np.testing.assert_array_equal(read(head + x.tobytes(), len(head)).inputs["x"], x)


def test_numbers_that_are_not_finite_go_in_binary() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1], "<f4")
    head = body(binary(X, 24), N)
    assert read(head + x.tobytes(), len(head)).inputs["x"].tobytes() == x.tobytes()


@pytest.mark.parametrize(
    ("dtype", "data", "wanted"),
    [
        ("bool", [True, False], [True, False]),
        ("uint8", [0, 255], [0, 255]),
        ("int64", [-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
        ("float16", [1.5, -65504], [1.5, -65504]),
        ("float64", [1e300, 0.1], [1e300, 0.1]),
        ("bfloat16", [1.5, -3], [1.5, -3]),
    ],
)
def test_every_type_is_read_from_json(dtype: str, data: list[Any], wanted: list[Any]) -> None:
    array = one(dtype, data, (2,))
    assert array.dtype.name == dtype
    assert array.astype(object).tolist() == wanted


@pytest.mark.parametrize("datatype", DATATYPES)
def test_the_wire_is_little_endian(datatype: str) -> None:
    assert element_type(datatype).byteorder in ("<", "|", "=")
    assert datatype_of(DATATYPES[datatype]) == datatype


@pytest.mark.parametrize(
    ("dtype", "data", "sentence"),
    [
        ("uint8", [0, 256], "number that UINT8 does not hold"),
        ("uint8", [-1, 0], "number that UINT8 does not hold"),
        ("int64", [2**63, 0], "number that INT64 does not hold"),
        ("int32", [1.5, 0], "elements that are not INT32"),
        ("int32", [True, 0], "elements that are not INT32"),
        ("bool", [1, 0], "elements that are not BOOL"),
        ("float32", [1e39, 0], "number that FP32 does not hold"),
        ("float32", ["1", 0], "elements that are not FP32"),
        ("float32", [None, 0], "elements that are not FP32"),
        ("float32", [{}, 0], "elements that are not FP32"),
        ("float16", [65520, 0], "number that FP16 does not hold"),
        ("float64", [10**400, 0], "number that FP64 does not hold"),
        ("float32", [1], "has 1 elements, and its shape"),
        ("float32", [1, 2, 3], "has 3 elements, and its shape"),
        ("float32", [[1], [2]], "elements that are not FP32"),
        ("float32", 3, "no 'data' that is a list"),
    ],
)
def test_elements_that_do_not_fit_are_refused(dtype: str, data: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        one(dtype, data, (2,))


@pytest.mark.parametrize(
    "data",
    [
        [[1, 2], [3, 4]],
        [[1, 2, 3]],
        [[1, 2, 3], 4, 5, 6],
        [[[1, 2, 3]], [[4, 5, 6]]],
        [[1, 2, 3], [4, 5, 6], []],
    ],
)
def test_lists_that_are_nested_otherwise_are_refused(data: list[Any]) -> None:
    with pytest.raises(InputError, match=r"nested as its shape|elements that are not FP32"):
        read(body({**X, "data": data}, N))


WRONG: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid JSON"),
    "cut off": (body(X, N)[:-5], "not valid JSON"),
    "two documents": (body(X, N) * 2, "not valid JSON"),
    "a list": (b"[]", "not a JSON object"),
    "a number": (b"7", "not a JSON object"),
    "wrong UTF-8": (b'{"id": "\xff"}', "is not UTF-8: byte 8 is wrong"),
    "deep lists": (b"[" * 10**5, "nested too deeply|not valid JSON"),
    "deep objects": (b'{"a":' * 10**5, "nested too deeply|not valid JSON"),
    "a long number": (b"9" * 10**4, "not valid JSON|not a JSON object"),
    "NaN": (b'{"inputs": NaN}', "NaN is not JSON"),
    "infinity": (b'{"inputs": -Infinity}', "-Infinity is not JSON"),
    "1e999": (body(X, N).replace(b"2.5", b"1e999"), "number that FP32 does not hold"),
    "a name twice": (b'{"id": "a", "id": "b"}', "says 'id' twice"),
    "an id that is no text": (body(X, N, id=7), "'id' is not a string"),
    "no inputs": (b"{}", "has no 'inputs'"),
    "inputs that are no list": (b'{"inputs": {}}', "has a broken 'inputs'"),
    "inputs that are no objects": (b'{"inputs": [1]}', "has a broken 'inputs'"),
    "none": (body(), "misses the input 'x', 'n'"),
    "one missing": (body(X), "misses the input 'n'"),
    "one twice": (body(X, N, X), "gives the input 'x' twice"),
    "an unknown one": (body(X, N, {**N, "name": "q"}), "has no input 'q'; its inputs are 'x', 'n'"),
    "a long unknown name": (body({**N, "name": "q" * 10**4}), r"'q{80}\.\.\.'"),
    "no name": (body({"shape": [1]}), "an input of the request has no 'name'"),
    "no shape": (body({**X, "shape": None}, N), "has no 'shape'"),
    "a shape of text": (body({**X, "shape": ["2", 3]}, N), "has no 'shape'"),
    "a shape of truths": (body({**X, "shape": [True, 3]}, N), "has no 'shape'"),
    "a shape of fractions": (body({**X, "shape": [2.0, 3]}, N), "has no 'shape'"),
    "a negative shape": (body({**X, "shape": [-2, -3]}, N), "not from 1 to 2.31 - 1: -2"),
    "an empty shape": (body({**X, "shape": [0, 3], "data": []}, N), "not from 1 to 2.31 - 1: 0"),
    "an overflowing shape": (body({**X, "shape": [2**63, 2]}, N), "not from 1 to"),
    "an endless shape": (body({**X, "shape": [10**300, 3]}, N), "a size that no tensor has"),
    "a huge shape": (body({**X, "shape": [2**31 - 1, 3]}, N), "has 6 elements, and its shape"),
    "a shape of another rank": (body({**X, "shape": [6]}, N), r"has 1 dimensions.*\(batch, 3\)"),
    "a shape that does not fit": (
        body({**X, "shape": [3, 2]}, N),
        r"has shape \(3, 2\), and the model wants \(batch, 3\)",
    ),
    "sizes that disagree": (
        body(X, {**N, "shape": [3], "data": [1, 2, 3]}),
        "'batch' is 2 in input 'x' and 3 here",
    ),
    "another type": (body({**X, "datatype": "FP64"}, N), "is FP64, and the model wants FP32"),
    "an unknown type": (body({**X, "datatype": "FP8"}, N), "no datatype that this server knows"),
    "text": (body({**X, "datatype": "BYTES"}, N), "no datatype that this server knows: 'BYTES'"),
    "no type": (body({**X, "datatype": 32}, N), "no datatype that this server knows: none"),
    "no data": (body({"name": "x", "shape": [2, 3], "datatype": "FP32"}, N), "has no 'data'"),
    "broken parameters": (body({**X, "parameters": []}, N), "'parameters' of the input 'x'"),
    "shared memory": (
        body({**X, "parameters": {"shared_memory_region": "r"}}, N),
        "asks for 'shared_memory_region', which this server does not have",
    ),
    "an unknown output": (body(X, N, outputs=[{"name": "q"}]), "no output 'q'; its outputs are"),
    "an output twice": (body(X, N, outputs=[{"name": "y"}] * 2), "asks for the output 'y' twice"),
    "broken outputs": (body(X, N, outputs="y"), "has a broken 'outputs'"),
    "a wish that is no truth": (
        body(X, N, outputs=[{"name": "y", "parameters": {"binary_data": 1}}]),
        "'binary_data' is neither true nor false",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_with_a_sentence(case: str) -> None:
    text, sentence = WRONG[case]
    with pytest.raises(InputError, match=sentence):
        read(text)


@pytest.mark.parametrize(
    ("entry", "tensors", "sentence"),
    [
        (binary(X, 24), b"", "has 24 bytes, and 0 are left"),
        (binary(X, 24), bytes(23), "has 24 bytes, and 23 are left"),
        (
            binary(X, 24),
            bytes(25),
            "25 bytes follow the request's JSON, and its inputs speak of 24",
        ),
        (binary(X, 20), bytes(20), "says that it has 20 bytes"),
        (binary(X, -24), bytes(24), "no number of bytes"),
        (binary(X, 2**80), bytes(24), "says that it has"),
        ({**binary(X, 24), "data": [1]}, bytes(24), "both as JSON and in binary"),
        ({**X, "parameters": {"binary_data_size": "24"}}, bytes(24), "both as JSON|no number"),
        (X, bytes(1), "1 bytes follow the request's JSON, and its inputs speak of 0"),
    ],
)
def test_wrong_binary_data_is_refused(entry: dict[str, Any], tensors: bytes, sentence: str) -> None:
    head = body(entry, N)
    with pytest.raises(InputError, match=sentence):
        read(head + tensors, len(head))


def test_a_byte_that_is_no_truth_is_refused() -> None:
    specs = (TensorSpec("a", (2,), "bool"),)
    head = body(binary({"name": "a", "shape": [2], "datatype": "BOOL"}, 2))
    read_request(head + b"\0\1", len(head), specs, OUTPUTS, {})
    with pytest.raises(InputError, match="a byte that is neither 0 nor 1"):
        read_request(head + b"\0\2", len(head), specs, OUTPUTS, {})


def test_more_json_than_body_is_refused() -> None:
    with pytest.raises(InputError, match="and Inference-Header-Content-Length says that 999"):
        read(body(X, N), 999)


def test_sizes_are_bounded_where_that_is_asked_for() -> None:
    read(body(X, N), batch=2)
    with pytest.raises(InputError, match="'batch' is 2, and this server takes 1 at most"):
        read(body(X, N), batch=1)


NAMES = {"model_name": "m", "model_version": "1"}


def test_an_answer_has_the_outputs_that_were_asked_for() -> None:
    request = read(body(X, N, id="7", outputs=[{"name": "z"}]))
    answer = write_answer(request, NAMES, {"y": np.zeros((2, 3), "f4"), "z": np.array([1, 2])})
    assert answer.header_length is None
    assert json.loads(answer.body) == {
        **NAMES,
        "id": "7",
        "outputs": [{"name": "z", "datatype": "INT64", "shape": [2], "data": [1, 2]}],
    }


@pytest.mark.parametrize("everything", [True, False])
def test_outputs_come_in_binary_where_that_is_asked_for(everything: bool) -> None:
    wishes: dict[str, Any] = {"parameters": {"binary_data_output": True}}
    if not everything:
        wishes = {"outputs": [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}]}
    request = read(body(X, N, **wishes))
    y, z = np.array([[np.nan, 1, np.inf]], "f4"), np.array([5])
    answer = write_answer(request, NAMES, {"y": y, "z": z})
    assert answer.header_length is not None
    head, tensors = answer.body[: answer.header_length], answer.body[answer.header_length :]
    outputs = json.loads(head)["outputs"]
    assert outputs[0]["parameters"] == {"binary_data_size": 12}
    assert tensors == y.tobytes() + (z.tobytes() if everything else b"")
    assert outputs[1].get("data") == (None if everything else [5])


def test_json_cannot_say_what_is_not_finite() -> None:
    outputs = {"y": np.array([np.nan], "f4"), "z": np.array([1])}
    with pytest.raises(InputError, match=r"'y' holds numbers that are not finite.*in binary"):
        write_answer(read(body(X, N)), NAMES, outputs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_come_back_from_json_as_they_went_in(numbers: list[float]) -> None:
    array = one("float32", numbers, (len(numbers),))
    assert array.tobytes() == np.array(numbers, np.float32).tobytes()
    request = InferRequest(None, {}, (WantedOutput("y", False),))
    answer = json.loads(write_answer(request, NAMES, {"y": array}).body)
    assert np.array(answer["outputs"][0]["data"], np.float32).tobytes() == array.tobytes()


def test_metadata_say_minus_one_for_a_free_size() -> None:
    data = describe_model("m", "1", INPUTS, OUTPUTS)
    assert data["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    assert data["versions"] == ["1"] and [each["name"] for each in data["outputs"]] == ["y", "z"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["x", "n", "y", "FP32", "INT64"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "binary_data_size"])
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


def is_read_or_refused(text: bytes, header_length: int | None = None) -> None:
    try:
        request = read(text, header_length)
    except InputError as error:
        assert len(str(error)) > 10 and "\n" not in str(error)
    else:
        assert request.inputs.keys() == {"x", "n"}


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["inputs", "outputs", "id", "parameters"]), JSON))
def test_no_json_breaks_the_reader(data: dict[str, Any]) -> None:
    is_read_or_refused(json.dumps(data).encode())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(0, 250))
def test_no_bytes_break_the_reader(text: bytes, header_length: int | None) -> None:
    is_read_or_refused(text, header_length)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_change_to_a_right_request_breaks_the_reader(data: st.DataObject) -> None:
    head = body(binary(X, 24), N, outputs=[{"name": "y"}])
    text = bytearray(head + bytes(24))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    is_read_or_refused(bytes(text), data.draw(st.sampled_from([len(head), None, 0, len(head) - 1])))


@settings(max_examples=200, deadline=None)
@given(JSON, JSON, JSON)
def test_no_field_of_an_input_breaks_the_reader(shape: Any, data: Any, parameters: Any) -> None:
    is_read_or_refused(body({**X, "shape": shape}, N))
    is_read_or_refused(body({**X, "data": data}, N))
    is_read_or_refused(body({**X, "parameters": parameters}, N))
