"""What decides a compiled library: everything that its place in the cache depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .cpu_features import cache_bytes, machine_flags, machine_identity
from .files import home_folder

# Packages that have a part in the code that comes out.
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "scipy", "tvm-sparse")


@dataclass(frozen=True)
class LibraryKey:
    """Everything that decides what is compiled.

    Attributes
    ----------
    model : str
        Digest of the model's bytes, and of the data files that they name.
    shapes : mapping of str to tuple of int
        Symbolic dimensions that are fixed, by input.
    target : str
        As it was asked for: "native" means the machine below.
    machine : str
        The processor, and the sizes of its caches.
    features : tuple of str
        The processor's flags as the system tells them; a virtual machine may hide some.
    threads : int
    options : mapping
        What else was asked for.
    records, plan, calibration : str
        Digests of the files, empty where there is none.
    versions : mapping of str to str
        Of the packages that have a part in it.
    code : str
        Digest of this package's own modules: two states of a checkout have one version.
    """

    model: str
    shapes: Mapping[str, tuple[int, ...]]
    target: str
    machine: str
    features: tuple[str, ...]
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)
    records: str = ""
    plan: str = ""
    calibration: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    code: str = ""

    def digest(self) -> str:
        """Return the name of the library's place in the cache: 32 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_here(
    model: str,
    *,
    target: Any = "native",
    threads: int,
    shapes: Mapping[str, Any] | None = None,
    records: str | os.PathLike[str] | None = None,
    plan: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> LibraryKey:
    """Gather the key of a library that is compiled on this machine, now.

    TVM is not loaded for it.

    Parameters
    ----------
    model : str
        What `model_digest` returned.
    target : str or mapping
        As for `compile`.
    threads : int
        As for `compile`.
    shapes, records, plan
        As for `compile`; the latter two are paths.
    options : mapping
        Of plain data.
    """
    return LibraryKey(
        model=model,
        shapes={name: tuple(map(int, shape)) for name, shape in (shapes or {}).items()},
        target=target if isinstance(target, str) else json.dumps(target, sort_keys=True),
        machine=f"{machine_identity()}, L1 {cache_bytes(1)}, L3 {cache_bytes(3)}",
        features=tuple(sorted(machine_flags() or ())),
        threads=threads,
        options=dict(options or {}),
        records=_file_digest(records),
        plan=_file_digest(plan),
        calibration=_calibration_digest(),
        versions={name: _version(name) for name in _PACKAGES},
        code=_code_digest(),
    )


def model_digest(source: str | os.PathLike[str] | bytes) -> str:
    """Hash an ONNX model, with the files that hold its external data.

    A file that is missing counts as empty: loading the model says so better.

    Raises
    ------
    OSError
        When `source` is a path that cannot be read.
    """
    base = None if isinstance(source, bytes) else Path(os.path.abspath(source)).parent
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    state = hashlib.sha256(data)
    # The message is parsed only where it may name files: the key of that field is written out.
    locations = _external_files(data) if base is not None and b"location" in data else ()
    for location in sorted(set(locations)):
        state.update(f"\0{location}\0".encode())
        assert base is not None, "bytes name no files"
        _hash_file(state, base / location)
    return state.hexdigest()


def _external_files(data: bytes) -> Iterator[str]:
    import onnx

    try:
        model = onnx.ModelProto.FromString(data)
    except Exception:
        # No model at all: loading it says so.
        return
    parts = [model.graph, *model.functions]
    while parts:
        part = parts.pop()
        tensors = list(getattr(part, "initializer", ()))
        for sparse in getattr(part, "sparse_initializer", ()):
            tensors += [sparse.values, sparse.indices]
        for attribute in (attribute for node in part.node for attribute in node.attribute):
            sparse = attribute.sparse_tensor
            tensors += [attribute.t, *attribute.tensors, sparse.values, sparse.indices]
            parts += [attribute.g] if attribute.HasField("g") else []
            parts += attribute.graphs
        for tensor in tensors:
            yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _hash_file(state: Any, path: Path) -> None:
    try:
        with open(path, "rb", buffering=0) as stream:
            while block := stream.read(1 << 24):
                state.update(block)
    except OSError:
        state.update(b"\0unreadable")


def _file_digest(path: str | os.PathLike[str] | None) -> str:
    if path is None:
        return ""
    state = hashlib.sha256()
    _hash_file(state, Path(path))
    return state.hexdigest()


def _calibration_digest() -> str:
    """Hash all calibrations that lie where plans look: which one counts, only TVM could say."""
    state = hashlib.sha256()
    for path in sorted(home_folder().glob("machine-*.json")):
        state.update(path.name.encode())
        _hash_file(state, path)
    return state.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@lru_cache(maxsize=1)
def _code_digest() -> str:
    state = hashlib.sha256()
    for package in ("tvm_sparse", "tvm_sparse.passes", "tvm_sparse.schedules"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                state.update(str(path.relative_to(folder)).encode())
                _hash_file(state, path)
    return state.hexdigest()
