"""Tensors by name, out of safetensors files: read one at a time, when they are asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingExtraError, ModelError
from ..files import written_beside
from ..plain_data import parse_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes
    ----------
    dtype : str
        NumPy's name of the type, or what the file calls it where NumPy has none ("F8_E4M3").
    read : callable
        Returns the value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class TensorFiles:
    """All tensors of a checkpoint by name, and what messages call it."""

    title: str
    tensors: Mapping[str, StoredTensor]


def is_checkpoint(source: Any) -> bool:
    """Say whether a path names tensors without a graph: a safetensors file, index or folder."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(os.fspath(source))
    return path.name.endswith((".safetensors", ".safetensors.index.json")) or (
        path.is_dir() and bool(_files_of_folder(path))
    )


def open_tensors(source: Any) -> TensorFiles:
    """Find the tensors of a file, of a folder of files, or of a mapping.

    Parameters
    ----------
    source : path or mapping of str to array
        A ``.safetensors`` file; the index of several (``model.safetensors.index.json``); a folder
        with either; or arrays of NumPy or PyTorch by name, such as a `state_dict`.

    Raises
    ------
    ModelError
        When a file is missing, damaged, or no safetensors file.
    MissingExtraError
        When the package safetensors is not installed.
    """
    if isinstance(source, TensorFiles):
        return source
    if isinstance(source, Mapping):
        return TensorFiles("the given weights", {k: _in_memory(k, v) for k, v in source.items()})
    if not isinstance(source, str | os.PathLike):
        raise ModelError(
            f"weights are a safetensors file or arrays by name, not a {type(source).__name__}"
        )
    path = Path(os.fspath(source))
    if not path.exists():
        raise ModelError(f"there is no file '{path}'")
    found: dict[str, StoredTensor] = {}
    for file in _files(path):
        for name, tensor in _read_file(file).items():
            if name in found:
                raise ModelError(f"the tensor '{name}' stands in two files of '{path}'")
            found[name] = tensor
    return TensorFiles(f"'{path.name}'", found)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = _files_of_folder(path)
        if not files:
            raise ModelError(f"the folder '{path}' holds no safetensors file")
        return _files(files[0]) if files[0].suffix == ".json" else files
    return _files_of_index(path) if path.suffix == ".json" else [path]


def _files_of_folder(folder: Path) -> list[Path]:
    """List the index if there is one, else all safetensors files."""
    index = folder / INDEX
    return [index] if index.is_file() else sorted(folder.glob("*.safetensors"))


def _files_of_index(path: Path) -> list[Path]:
    try:
        names = set(parse_json(path.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"'{path}' is no index of safetensors files") from None
    files = []
    for name in sorted(map(str, names)):
        file = path.parent / name
        if Path(name).name != name:
            raise ModelError(f"the index '{path}' names '{name}', outside its folder")
        # Not Path's: that raises for names which no file can have.
        if not os.path.isfile(file):
            raise ModelError(f"the file '{name}', which the index '{path}' names, is missing")
        files.append(file)
    return files


# What files call their types -> NumPy's names.
_TYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "U8": "uint8",
}


def _read_file(path: Path) -> dict[str, StoredTensor]:
    # NumPy knows bfloat16 by its name as soon as this package, which onnx brings, is loaded.
    import ml_dtypes  # noqa: F401

    need_safetensors(f"reading '{path.name}'")
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(os.fspath(path), "numpy")
        names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{path}' is no whole safetensors file: {error}") from None
    found = {}
    for name in names:
        part = file.get_slice(name)
        kind = part.get_dtype()
        found[name] = StoredTensor(
            name, tuple(part.get_shape()), _TYPES.get(kind, kind), _reader(file, name)
        )
    return found


def _reader(file: Any, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.get_tensor(name)


def need_safetensors(what: str) -> None:
    """Check that the package is there.

    Raises
    ------
    MissingExtraError
        When it is not.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise MissingExtraError(
            f"{what} needs the package safetensors: pip install tvm-sparse[safetensors]"
        )


def save_tensors(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a safetensors file, beside its place and renamed into it.

    Raises
    ------
    SparseError
        When the file cannot be written.
    MissingExtraError
        When the package safetensors is not installed.
    """
    need_safetensors(f"writing '{Path(path).name}'")
    from safetensors.numpy import save_file

    with written_beside(path) as temporary:
        save_file(dict(arrays), temporary)


def _in_memory(name: str, value: Any) -> StoredTensor:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy takes no bfloat16 of PyTorch; float32 holds each of its numbers.
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    array = np.asarray(value)
    return StoredTensor(name, array.shape, str(array.dtype), lambda: array)
