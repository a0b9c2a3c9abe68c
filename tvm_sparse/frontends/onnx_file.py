"""Read an ONNX file into a graph without weights, and its weights as NumPy arrays.

Weights leave the protobuf first: everything after works on a small message, so that models over the
2 GB limit of protobuf pass through the checker, the inliner and the version converter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..claims import claimed_zeros
from ..errors import ModelError
from ..onnx_check import check_model, check_tensor, numpy_type


@dataclass
class OnnxModel:
    """An ONNX graph whose initialisers stand in `constants`.

    Attributes
    ----------
    proto : onnx.ModelProto
        Without initialisers.
    constants : dict of str to numpy.ndarray
        Dense, whatever their form in the file.
    base : pathlib.Path or None
        The folder of external data.
    """

    proto: onnx.ModelProto
    constants: dict[str, np.ndarray]
    base: Path | None
    title: str
    input_count: int = 0

    @property
    def graph(self) -> onnx.GraphProto:
        """The main graph."""
        return self.proto.graph


def read_onnx(source: Any) -> OnnxModel:
    """Read a path, the bytes of a file, or a ModelProto.

    Raises
    ------
    ModelError
        When it is no ONNX model, is cut off, or its external data cannot be found.
    """
    if isinstance(source, onnx.ModelProto):
        return _split(source, None, "an ONNX model")
    # Not kept in a variable: the message is as large as the weights.
    if isinstance(source, bytes | bytearray | memoryview):
        return _split(parse_onnx(source), None, "an ONNX model")
    path = Path(os.fspath(source))
    return _split(parse_onnx(path), path.parent, f"'{path.name}'")


def parse_onnx(source: Any) -> onnx.ModelProto:
    """Parse a path or the bytes of a file, without its external data.

    Raises
    ------
    ModelError
        When it cannot be read, is no ONNX model, or is cut off.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _parse(bytes(source), "the given bytes")
    path = Path(os.fspath(source))
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder, not an ONNX file")
    try:
        return _parse(path.read_bytes(), f"'{path}'")
    except FileNotFoundError:
        raise ModelError(f"there is no file '{path}'") from None
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}") from None


def _parse(data: bytes, title: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{title} is empty")
    try:
        # Not onnx.load: it would guess a text format from the name, and load external data twice.
        proto = onnx.ModelProto.FromString(data)
    except Exception:
        raise ModelError(f"{title} is not an ONNX file, or it is cut off") from None
    if not proto.HasField("graph"):
        raise ModelError(f"{title} is not an ONNX model: it holds no graph")
    return proto


def _split(proto: onnx.ModelProto, base: Path | None, title: str) -> OnnxModel:
    if not proto.HasField("graph") or not proto.graph.output:
        raise ModelError(f"{title} has no outputs, so there is nothing to compute")
    check_model(proto, title)
    model = OnnxModel(_without_weights(proto), {}, base, title)
    for tensor in proto.graph.initializer:
        model.constants[tensor.name] = read_tensor(tensor, base)
    for sparse in proto.graph.sparse_initializer:
        model.constants[sparse.values.name] = densify(sparse, base)
    return model


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    small = onnx.ModelProto()
    small.ir_version = proto.ir_version
    small.opset_import.extend(proto.opset_import)
    small.functions.extend(proto.functions)
    graph, old = small.graph, proto.graph
    graph.name = old.name or "main"
    graph.node.extend(old.node)
    weights = {tensor.name for tensor in old.initializer}
    weights |= {sparse.values.name for sparse in old.sparse_initializer}
    graph.input.extend(value for value in old.input if value.name not in weights)
    graph.output.extend(old.output)
    return small


def read_tensor(tensor: onnx.TensorProto, base: Path | None) -> np.ndarray:
    """Return the value of a tensor, from the file or from external data.

    Raises
    ------
    ModelError
        When the data is missing or too short.
    """
    check_tensor(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _read_external(tensor, base)
    return numpy_helper.to_array(tensor)


def _read_external(tensor: onnx.TensorProto, base: Path | None) -> np.ndarray:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if base is None:
        raise ModelError(
            f"the weight '{tensor.name}' stands in the external file '{location}'; "
            "pass the model's path, not its bytes"
        )
    path = _external_file(location, base, tensor.name)
    offset, length = (_number(entries, key, tensor.name) for key in ("offset", "length"))
    if tensor.data_type not in _BYTE_SIZED:
        return _read_packed(tensor, path, offset, length)
    dtype = numpy_type(tensor.data_type, f"the weight '{tensor.name}'")
    data = _read_range(path, location, tensor.name, offset, dtype, math.prod(tensor.dims))
    return data.reshape(tuple(tensor.dims))


def _external_file(location: str, base: Path, name: str) -> Path:
    """Find a file of external data, in the folder of the model and nowhere else."""
    if "\0" in location or os.path.isabs(location):
        raise ModelError(f"the external data '{location}' lies outside the model's folder")
    # Not Path's own methods: those raise for names which no file can have.
    path = Path(os.path.realpath(base / location))
    if not path.is_relative_to(os.path.realpath(base)):
        raise ModelError(f"the external data '{location}' lies outside the model's folder")
    if not os.path.exists(path):
        raise ModelError(f"the external data file '{location}' with the weight '{name}' is missing")
    # A pipe would be waited for.
    if not os.path.isfile(path):
        raise ModelError(f"the external data '{location}' of the weight '{name}' is no file")
    return path


def _number(entries: Mapping[str, str], key: str, name: str) -> int:
    text = entries.get(key) or "0"
    # No file is longer than what 18 digits say.
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ModelError(f"the external data of the weight '{name}' has no number as its {key}")
    return int(text)


def _read_range(
    path: Path, location: str, name: str, offset: int, dtype: np.dtype, count: int
) -> np.ndarray:
    try:
        data = _read_bytes(path, offset, count * dtype.itemsize)
    except OSError as error:
        raise ModelError(f"the external data file '{location}' cannot be read: {error}") from None
    if data.size != count * dtype.itemsize:
        raise ModelError(f"the external data file '{location}' ends within the weight '{name}'")
    return data.view(dtype)


def _read_bytes(path: Path, offset: int, length: int) -> np.ndarray:
    """Read a range of a file, shorter if the file ends, in few and large system calls."""
    # np.fromfile reads 4 KiB at a time, which takes twice as long on some file systems.
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        data = np.empty(max(min(length, path.stat().st_size - offset), 0), np.uint8)
        done = 0
        while done < data.size:
            count = file.readinto(data.data[done:])
            if not count:
                break
            done += count
    return data[:done]


_BYTE_SIZED = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT16,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.UINT16,
        onnx.TensorProto.UINT32,
        onnx.TensorProto.UINT64,
        onnx.TensorProto.BOOL,
    }
)


def _read_packed(tensor: onnx.TensorProto, path: Path, offset: int, length: int) -> np.ndarray:
    """Read elements smaller than a byte, whose packing onnx itself knows best."""
    inline = onnx.TensorProto()
    inline.CopyFrom(tensor)
    inline.data_location = onnx.TensorProto.DEFAULT
    del inline.external_data[:]
    length = length or max(path.stat().st_size - offset, 0)
    raw = _read_range(path, path.name, tensor.name, offset, np.dtype(np.uint8), length)
    inline.raw_data = raw.tobytes()
    check_tensor(inline)
    return numpy_helper.to_array(inline)


def densify(sparse: onnx.SparseTensorProto, base: Path | None) -> np.ndarray:
    """Turn a COO tensor, with linear or per-axis indices, into a dense array."""
    name = sparse.values.name
    values = read_tensor(sparse.values, base)
    indices = read_tensor(sparse.indices, base)
    dims = tuple(sparse.dims)
    try:
        dense = claimed_zeros(dims, values.dtype)
    except ValueError as error:
        raise ModelError(f"the sparse initialiser '{name}' cannot be: {error}") from None
    try:
        if indices.ndim == 1:
            dense.reshape(-1)[_checked(indices, dense.size)] = values
        else:
            axes = [_checked(column, size) for column, size in zip(indices.T, dims, strict=True)]
            dense[tuple(axes)] = values
    except (IndexError, ValueError):
        raise ModelError(
            f"the sparse initialiser '{name}' has indices that do not fit its shape {list(dims)}"
        ) from None
    return dense


def _checked(indices: np.ndarray, size: int) -> np.ndarray:
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise IndexError
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError
    return indices
