"""Requests and answers of the Open Inference Protocol, version 2, as bytes and as arrays.

Tensors come as JSON, or in binary after the JSON that describes them (the extension "binary tensor
data"). Everything that a client sends is checked before memory is taken for it: no more
elements are made than the body has bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from ..errors import InputError
from ..model import TensorSpec
from ..runtime import check_inputs
from .datatypes import DATATYPES, datatype_of, element_type, json_kinds
from .refusal import quoted

# No tensor that fits a request has a larger one, and products of these do not overflow.
_LARGEST_SIZE = 2**31 - 1

_BINARY_SIZE = "binary_data_size"
_UNSUPPORTED = ("shared_memory_region", "classification")


@dataclass(frozen=True)
class WantedOutput:
    """An output that the answer shall have, and whether in binary."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A request that was checked.

    Attributes
    ----------
    id : str or None
        What the client calls it; the answer repeats it.
    inputs : mapping of str to numpy.ndarray
        By name, one for each input of the model; read-only where they lie in the request's body.
    outputs : tuple of WantedOutput
        In the order in which the client asked for them.
    """

    id: str | None
    inputs: Mapping[str, np.ndarray]
    outputs: tuple[WantedOutput, ...]


@dataclass(frozen=True)
class Answer:
    """A body, and how much of it is JSON where binary tensors follow that."""

    body: bytes
    header_length: int | None


def read_request(
    body: bytes,
    header_length: int | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_sizes: Mapping[str, int],
) -> InferRequest:
    """Read the body of a request.

    Parameters
    ----------
    body : bytes
        JSON, and binary tensors after it.
    header_length : int or None
        How many bytes of it are JSON; None for all.
    inputs, outputs : sequence of TensorSpec
        The model's.
    max_sizes : mapping of str to int
        The largest value of each symbolic size; others are bounded by the body alone.

    Raises
    ------
    InputError
        With a sentence for the client, for everything that can be wrong with it.
    """
    if header_length is not None and header_length > len(body):
        raise InputError(
            f"the body has {len(body)} bytes, and Inference-Header-Content-Length says that "
            f"{header_length} of them are JSON"
        )
    data = _read_json(body if header_length is None else body[:header_length])
    tensors = memoryview(body)[len(body) if header_length is None else header_length :]
    request_id = data.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InputError("the request's 'id' is not a string")
    arrays = _read_inputs(data, tensors, inputs)
    values = [arrays[spec.name] for spec in inputs]
    _check_sizes(check_inputs(inputs, values), max_sizes)
    return InferRequest(request_id, arrays, _read_outputs(data, outputs))


def write_answer(
    request: InferRequest, model: Mapping[str, str], outputs: Mapping[str, np.ndarray]
) -> Answer:
    """Write the answer to a request.

    Parameters
    ----------
    request : InferRequest
        What is answered.
    model : mapping of str to str
        `model_name` and `model_version`.
    outputs : mapping of str to numpy.ndarray
        What the model has computed, by name.

    Raises
    ------
    InputError
        When an output that is to be JSON holds numbers that JSON has no words for.
    """
    head: dict[str, Any] = dict(model)
    if request.id is not None:
        head["id"] = request.id
    head["outputs"] = described = []
    parts: list[bytes] = []
    for wanted in request.outputs:
        array = outputs[wanted.name]
        entry: dict[str, Any] = {
            "name": wanted.name,
            "datatype": datatype_of(array.dtype.name),
            "shape": list(array.shape),
        }
        if wanted.binary:
            parts.append(array.astype(element_type(entry["datatype"]), copy=False).tobytes())
            entry["parameters"] = {_BINARY_SIZE: len(parts[-1])}
        else:
            entry["data"] = _to_json(wanted.name, array)
        described.append(entry)
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Answer(b"".join([text, *parts]), len(text) if parts else None)


def describe_model(
    name: str, version: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, Any]:
    """Return a model's metadata; -1 stands for a symbolic size."""
    return {
        "name": name,
        "versions": [version],
        "platform": "tvm_sparse",
        "inputs": [_describe(spec) for spec in inputs],
        "outputs": [_describe(spec) for spec in outputs],
    }


def _describe(spec: TensorSpec) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": shape}


def _read_json(text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(
            text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_once_each
        )
    except UnicodeDecodeError as error:
        raise InputError(f"the request's JSON is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise InputError("the request's JSON is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"the request is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError("the request is not a JSON object")
    return data


def _refuse_constant(word: str) -> NoReturn:
    raise InputError(f"{word} is not JSON: send numbers that are not finite in binary")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in data if names.count(name) > 1)
        raise InputError(f"the request's JSON says {quoted(twice)} twice in one object")
    return data


def _read_inputs(
    data: Mapping[str, Any], tensors: memoryview, specs: Sequence[TensorSpec]
) -> dict[str, np.ndarray]:
    wanted = {spec.name: spec for spec in specs}
    arrays: dict[str, np.ndarray] = {}
    used = 0
    for entry in _objects(data, "inputs"):
        name = _name(entry, "input")
        if name not in wanted:
            names = ", ".join(f"'{known}'" for known in wanted)
            raise InputError(f"the model has no input {quoted(name)}; its inputs are {names}")
        if name in arrays:
            raise InputError(f"the request gives the input '{name}' twice")
        shape = _shape(entry, wanted[name])
        datatype = _datatype(entry, wanted[name])
        size = _parameters(entry, f"input '{name}'").get(_BINARY_SIZE)
        if size is None:
            arrays[name] = _from_json(name, entry.get("data"), shape, datatype)
        else:
            if "data" in entry:
                raise InputError(f"input '{name}' comes both as JSON and in binary")
            arrays[name] = _from_binary(name, tensors[used:], size, shape, datatype)
            used += size
    missing = [f"'{name}'" for name in wanted if name not in arrays]
    if missing:
        raise InputError(f"the request misses the input {', '.join(missing)}")
    if used != len(tensors):
        raise InputError(
            f"{len(tensors)} bytes follow the request's JSON, and its inputs speak of {used}"
        )
    return arrays


def _read_outputs(data: Mapping[str, Any], specs: Sequence[TensorSpec]) -> tuple[WantedOutput, ...]:
    everything = _flag(_parameters(data, "request"), "binary_data_output", False)
    if "outputs" not in data:
        return tuple(WantedOutput(spec.name, everything) for spec in specs)
    known = [spec.name for spec in specs]
    wanted: list[WantedOutput] = []
    for entry in _objects(data, "outputs"):
        name = _name(entry, "output")
        if name not in known:
            names = ", ".join(f"'{each}'" for each in known)
            raise InputError(f"the model has no output {quoted(name)}; its outputs are {names}")
        if any(name == other.name for other in wanted):
            raise InputError(f"the request asks for the output '{name}' twice")
        parameters = _parameters(entry, f"output '{name}'")
        wanted.append(WantedOutput(name, _flag(parameters, "binary_data", everything)))
    # An empty list asks for all, as one that is not there does.
    return tuple(wanted) or tuple(WantedOutput(name, everything) for name in known)


def _objects(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = data.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        state = "has no" if key not in data else "has a broken"
        raise InputError(f"the request {state} '{key}': it is a list of JSON objects")
    return entries


def _name(entry: Mapping[str, Any], kind: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str):
        raise InputError(f"an {kind} of the request has no 'name'")
    return name


def _parameters(entry: Mapping[str, Any], whose: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InputError(f"the 'parameters' of the {whose} are no JSON object")
    for name in _UNSUPPORTED:
        if name in parameters:
            raise InputError(f"the {whose} asks for '{name}', which this server does not have")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"the parameter '{name}' is neither true nor false")
    return value


def _shape(entry: Mapping[str, Any], spec: TensorSpec) -> tuple[int, ...]:
    shape = entry.get("shape")
    # A Boolean is a number to Python.
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise InputError(f"input '{spec.name}' has no 'shape' that is a list of whole numbers")
    if len(shape) != len(spec.shape):
        raise InputError(
            f"input '{spec.name}' has {len(shape)} dimensions, and the model wants "
            f"{len(spec.shape)}: ({', '.join(map(str, spec.shape))})"
        )
    wrong = next((size for size in shape if not 1 <= size <= _LARGEST_SIZE), None)
    if wrong is not None:
        shown = wrong if abs(wrong) < 10**20 else "a size that no tensor has"
        raise InputError(f"input '{spec.name}' has a size that is not from 1 to 2^31 - 1: {shown}")
    return tuple(shape)


def _datatype(entry: Mapping[str, Any], spec: TensorSpec) -> str:
    datatype, wanted = entry.get("datatype"), datatype_of(spec.dtype)
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        given = quoted(datatype) if isinstance(datatype, str) else "none"
        raise InputError(f"input '{spec.name}' has no datatype that this server knows: {given}")
    if datatype != wanted:
        raise InputError(f"input '{spec.name}' is {datatype}, and the model wants {wanted}")
    return datatype


def _from_binary(
    name: str, tensors: memoryview, size: Any, shape: tuple[int, ...], datatype: str
) -> np.ndarray:
    if type(size) is not int or size < 0:
        raise InputError(f"the '{_BINARY_SIZE}' of input '{name}' is no number of bytes")
    dtype = element_type(datatype)
    wanted = math.prod(shape) * dtype.itemsize
    if size != wanted:
        raise InputError(
            f"input '{name}' says that it has {size} bytes, and {datatype} in the shape "
            f"{list(shape)} takes {wanted}"
        )
    if size > len(tensors):
        raise InputError(
            f"input '{name}' has {size} bytes, and {len(tensors)} are left of the body"
        )
    part = tensors[:size]
    if datatype == "BOOL" and np.frombuffer(part, np.uint8).max() > 1:
        raise InputError(f"input '{name}' is BOOL and has a byte that is neither 0 nor 1")
    return np.frombuffer(part, dtype).reshape(shape)


def _from_json(name: str, data: Any, shape: tuple[int, ...], datatype: str) -> np.ndarray:
    if not isinstance(data, list):
        raise InputError(f"input '{name}' has no 'data' that is a list")
    flat = _flattened(name, data, shape)
    if len(flat) != math.prod(shape):
        raise InputError(
            f"input '{name}' has {len(flat)} elements, and its shape {list(shape)} speaks of "
            f"{math.prod(shape)}"
        )
    if not set(map(type, flat)) <= json_kinds(datatype):
        raise InputError(f"input '{name}' has elements that are not {datatype}")
    dtype = element_type(datatype)
    try:
        with np.errstate(over="ignore"):
            # To half precision by way of double: NumPy rounds no long integers to it.
            values = np.array(flat, np.float64 if float in json_kinds(datatype) else dtype)
            array = values.astype(dtype).reshape(shape)
    except OverflowError:
        raise InputError(f"input '{name}' has a number that {datatype} does not hold") from None
    if float in json_kinds(datatype) and not np.isfinite(array).all():
        raise InputError(f"input '{name}' has a number that {datatype} does not hold")
    return array


def _flattened(name: str, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return nested lists as one; what is one already stays."""
    if not any(isinstance(item, list) for item in data):
        return data
    level = data
    for depth, size in enumerate(shape):
        if depth:
            if not all(isinstance(item, list) and len(item) == size for item in level):
                raise InputError(
                    f"the lists in input '{name}' are not nested as its shape {list(shape)} says"
                )
            level = list(chain.from_iterable(level))
        elif len(level) != size:
            raise InputError(
                f"the lists in input '{name}' are not nested as its shape {list(shape)} says"
            )
    return level


def _to_json(name: str, array: np.ndarray) -> list[Any]:
    # ml_dtypes' numbers are none that JSON knows.
    wide = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    if wide.dtype.kind == "f" and not np.isfinite(wide).all():
        raise InputError(
            f"the output '{name}' holds numbers that are not finite, which JSON cannot say: ask "
            'for it in binary, with "parameters": {"binary_data": true}'
        )
    flat: list[Any] = wide.reshape(-1).tolist()
    return flat


def _check_sizes(sizes: Mapping[str, int], max_sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size > max_sizes.get(name, size):
            raise InputError(f"'{name}' is {size}, and this server takes {max_sizes[name]} at most")
