"""What an exported library says of itself, and how that text travels inside the shared library."""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from .dtypes import numpy_dtype
from .errors import LibraryError
from .model import TensorSpec
from .plain_data import parse_json

FORMAT = 1

# The marker finds the record, the checksum proves it: other data may hold the marker's bytes.
_MARKER = b"\x93tvm_sparse.manifest\r\n\x1a\n"
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = 32
_HEADER_BYTES = len(_MARKER) + _LENGTH.size + _CHECKSUM_BYTES

_SYMBOL = "tvm_sparse_manifest"
_C_LINE_BYTES = 96

_MOST_THREADS = 1 << 16


@dataclass(frozen=True)
class Manifest:
    """What `export` embeds in a library, and `load_module` reads back without running it.

    Attributes
    ----------
    package_version, tvm_version : str
        What built the library.
    target : mapping
        TVM's target as a dictionary.
    cpu_features : tuple of str
        Instruction sets that the code may use, by LLVM's names; see `cpu_features.X86_FEATURES`.
    threads : int
        Threads that the kernels were planned for.
    inputs, outputs : tuple of TensorSpec
        In calling order, with the user's names.
    plan, report : mapping
        The `Plan` and the `Report` as dictionaries.
    digest : str
        `Model.digest()` of the model that was compiled.
    kernels : mapping of str to tuple of str
        Layer names by kernel symbol, in the order in which one run calls that kernel.
    fresh_outputs : tuple of bool
        Whether each output is memory of its own, which a call may hand out without a copy; empty
        when that is not known.
    """

    package_version: str
    tvm_version: str
    target: Mapping[str, Any]
    cpu_features: tuple[str, ...]
    threads: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fresh_outputs: tuple[bool, ...] = ()

    def to_json(self) -> str:
        """Write the manifest as one line of ASCII JSON."""
        return json.dumps(self.to_data(), separators=(",", ":"))

    def to_data(self) -> dict[str, Any]:
        """Write the manifest as the object that `to_json` writes."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises
        ------
        LibraryError
            When the text is not JSON, or `from_data` refuses what it says.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise LibraryError(f"the library's manifest is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise LibraryError("the library's manifest is not a JSON object")
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Manifest:
        """Read the object that `to_json` writes.

        Raises
        ------
        LibraryError
            When it was written by a newer version, or lacks a field.
        """
        _check_format(data)
        return cls(
            package_version=take_field(data, "package_version", str),
            tvm_version=take_field(data, "tvm_version", str),
            target=take_field(data, "target", dict),
            cpu_features=_take_strings(data, "cpu_features"),
            threads=_take_threads(data),
            inputs=_take_specs(data, "inputs"),
            outputs=_take_specs(data, "outputs"),
            plan=take_field(data, "plan", dict),
            report=take_field(data, "report", dict),
            digest=take_field(data, "digest", str),
            kernels=_take_kernels(data),
            fresh_outputs=_take_flags(data, "fresh_outputs"),
        )


def to_record(manifest: Manifest) -> bytes:
    """Frame a manifest as it stands in a library: marker, length, SHA-256, JSON."""
    text = manifest.to_json().encode("ascii")
    return _MARKER + _LENGTH.pack(len(text)) + hashlib.sha256(text).digest() + text


def to_c_source(manifest: Manifest) -> str:
    """Write a manifest as C or C++ source of one constant array that linkers and `strip` keep.

    A constant array lies in the loaded part of the library, which `strip` never touches; `used` and
    `retain` keep compiler and linker from dropping it although nothing refers to it.
    """
    record = to_record(manifest)
    lines = (record[i : i + _C_LINE_BYTES] for i in range(0, len(record), _C_LINE_BYTES))
    literal = "\n".join(f'  "{c_escape(line)}"' for line in lines)
    return f"""\
#ifdef __cplusplus
extern "C" {{
#endif
#if defined(__has_attribute)
#if __has_attribute(retain)
#define TVM_SPARSE_RETAIN , retain
#endif
#endif
#ifndef TVM_SPARSE_RETAIN
#define TVM_SPARSE_RETAIN
#endif
extern const unsigned char {_SYMBOL}[{len(record) + 1}];
__attribute__((used, aligned(64) TVM_SPARSE_RETAIN))
const unsigned char {_SYMBOL}[{len(record) + 1}] =
{literal};
#ifdef __cplusplus
}}
#endif
"""


def read_manifest(path: str | PathLike[str]) -> Manifest:
    """Find the manifest in a library, without loading the library.

    Raises
    ------
    LibraryError
        When the file cannot be read or holds no intact manifest.
    """
    try:
        with open(path, "rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                text = next(_records(view), None)
    except (OSError, ValueError) as error:
        raise LibraryError(f"cannot read '{path}': {_reason(error)}") from None
    if text is None:
        raise LibraryError(
            f"'{path}' is a shared library, but tvm_sparse did not export it: it has no manifest"
        )
    return Manifest.from_json(text)


def _records(view: mmap.mmap) -> Iterator[str]:
    start = view.find(_MARKER)
    while start >= 0:
        body = start + _HEADER_BYTES
        if body <= len(view):
            (length,) = _LENGTH.unpack_from(view, start + len(_MARKER))
            checksum = view[body - _CHECKSUM_BYTES : body]
            text = view[body : body + length] if length <= len(view) - body else b""
            if len(text) == length and hashlib.sha256(text).digest() == checksum:
                yield text.decode("utf-8", errors="replace")
        start = view.find(_MARKER, start + 1)


def c_escape(data: bytes) -> str:
    """Write bytes as the inside of a C string literal."""
    # Always three octal digits: a shorter escape would swallow a digit that follows it.
    return "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03o}" for b in data)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "the file is empty"


def _check_format(data: Mapping[str, Any]) -> None:
    found = data.get("format")
    if not isinstance(found, int):
        raise LibraryError("the library's manifest does not say which format it is in")
    if found != FORMAT:
        raise LibraryError(
            f"the library's manifest has format {found}, and this version of tvm_sparse reads "
            f"format {FORMAT}: it was exported by tvm_sparse {data.get('package_version', '?')}"
        )


def take_field(data: Mapping[str, Any], key: str, kind: type) -> Any:
    """Take a field of a manifest's object that has to be there and of a kind.

    Raises
    ------
    LibraryError
    """
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        state = "lacks" if key not in data else "has a broken"
        raise LibraryError(f"the library's manifest {state} '{key}'")
    return value


def _take_strings(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = take_field(data, key, list)
    if not all(isinstance(value, str) for value in values):
        raise LibraryError(f"the library's manifest has a broken '{key}'")
    return tuple(values)


def _take_flags(data: Mapping[str, Any], key: str) -> tuple[bool, ...]:
    values = take_field(data, key, list)
    if not all(isinstance(value, bool) for value in values):
        raise LibraryError(f"the library's manifest has a broken '{key}'")
    return tuple(values)


def _take_specs(data: Mapping[str, Any], key: str) -> tuple[TensorSpec, ...]:
    specs = []
    for entry in take_field(data, key, list):
        if not isinstance(entry, dict):
            raise LibraryError(f"the library's manifest has a broken '{key}'")
        shape = take_field(entry, "shape", list)
        name, dtype = take_field(entry, "name", str), take_field(entry, "dtype", str)
        if not all(map(_is_dimension, shape)) or not _is_dtype(dtype):
            raise LibraryError(f"the library's manifest has a broken '{key}'")
        specs.append(TensorSpec(name=name, shape=tuple(shape), dtype=dtype))
    return tuple(specs)


def _is_dimension(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and 0 <= value < 1 << 63)


def _is_dtype(name: str) -> bool:
    try:
        numpy_dtype(name)
    except ImportError:
        # The type is known; the package that has it is asked for by whoever runs the model.
        return True
    except (TypeError, ValueError):
        return False
    return True


def _take_threads(data: Mapping[str, Any]) -> int:
    threads = take_field(data, "threads", int)
    if not 1 <= threads <= _MOST_THREADS:
        raise LibraryError("the library's manifest has a broken 'threads'")
    return int(threads)


def _take_kernels(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    kernels = take_field(data, "kernels", dict)
    return {symbol: _take_strings(kernels, symbol) for symbol in kernels}
