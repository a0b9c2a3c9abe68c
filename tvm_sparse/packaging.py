"""A folder that runs a model without the compiler: library, runtime, loader, manifest."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from . import __version__
from .cpu_features import X86_FEATURES
from .cuda_toolkit import find_cuda_runtime
from .device import CUDA, device_kind
from .errors import LibraryError
from .excerpt import excerpt
from .manifest import Manifest, read_manifest
from .opening import check_file
from .package_manifest import (
    MANIFEST,
    PackageManifest,
    PackedFile,
    read_package_manifest,
    sha256_of,
)
from .packaged import CUDA_RUNTIME, FFI_PACKAGE
from .runtime import CompiledModule, describe, find_runtime_folder

LIBRARY = "model.so"
LOADER = "load.py"

_RUNTIME, _EXTRA = "libtvm_runtime.so", "libtvm_runtime_extra.so"
# What a library that calls into the extra runtime holds: the names of the functions there.
_EXTRA_FUNCTIONS = b"tvm.contrib."

_HEADERS = ("tvm/ffi/c_api.h", "dlpack/dlpack.h")

_LOADER_TEXT = """Load the model of the package that this is in; needs numpy and apache-tvm-ffi.

    import load

    model = load.load()
    print(model)
    y = model(x)

It was cut out of tvm_sparse, which is licensed under Apache-2.0.
"""


def package(
    source: str | os.PathLike[str] | CompiledModule,
    folder: str | os.PathLike[str],
    *,
    cpp: bool = False,
    force: bool = False,
) -> PackageManifest:
    """Put a library and all that it needs to run into one folder, which may be moved.

    There are the library, TVM's runtime libraries, `load.py` for Python, a README and
    `manifest.json`, which says what the model takes and gives, and has the SHA-256 of every file.

    Parameters
    ----------
    source : path or CompiledModule
        A library that `export` wrote, or a module to export.
    folder : path
        Appears whole or not at all. A package that is there already is replaced.
    cpp : bool
        Also put headers and an example for C++ into the folder's `cpp/`.
    force : bool
        Replace what is there even when it is no package, or holds files that no package wrote.

    Returns
    -------
    PackageManifest
        What stands in `manifest.json`.

    Raises
    ------
    LibraryError
        When the source is no library of this package, something else is in the folder's place, or
        it cannot be written.
    TargetError
        When the library is for another kind of processor, or for a GPU and TVM lacks its runtime.
    """
    place = Path(os.path.realpath(folder))
    _check_replaceable(place, source, force)
    try:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as name:
            # The folder of tempfile is private; the package gets the usual rights.
            made = Path(name) / "package"
            made.mkdir()
            library = made / LIBRARY
            if isinstance(source, CompiledModule):
                source.export(library)
            else:
                shutil.copyfile(source, library)
            manifest = _fill(made, library, cpp)
            _replace(place, made, Path(name) / "older")
    except OSError as error:
        raise LibraryError(f"cannot write '{place}': {error.strerror or error}") from None
    return manifest


def _fill(folder: Path, library: Path, cpp: bool) -> PackageManifest:
    """Write all other files beside the library."""
    check_file(library)
    model = read_manifest(library)
    for path in _runtime_libraries(library, model):
        shutil.copy(path, folder / path.name)
    text = excerpt("packaged", ("load",), _LOADER_TEXT)
    (folder / LOADER).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_readme(model, cpp), encoding="utf-8")
    _copy_licences(folder / "licences")
    if cpp:
        _copy_cpp(folder / "cpp")
    files = {
        path.relative_to(folder).as_posix(): PackedFile(sha256_of(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    flags = {name: X86_FEATURES.get(name, name) for name in model.cpu_features}
    manifest = PackageManifest(LIBRARY, _versions(model), files, flags, model)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _runtime_libraries(library: Path, model: Manifest) -> Iterator[Path]:
    """Yield the libraries to copy; each finds the others beside it."""
    import tvm_ffi

    runtime = find_runtime_folder()
    yield Path(tvm_ffi.libinfo.find_libtvm_ffi())
    yield runtime / _RUNTIME
    if (runtime / _EXTRA).exists() and _holds(library, _EXTRA_FUNCTIONS):
        yield runtime / _EXTRA
    if device_kind(model.target) == CUDA:
        path = find_cuda_runtime()
        assert path.name == CUDA_RUNTIME
        yield path


def _holds(path: Path, text: bytes) -> bool:
    with open(path, "rb") as stream:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(text) >= 0


def _versions(model: Manifest) -> dict[str, str]:
    import tvm_ffi

    return {
        "tvm-sparse": __version__,
        "apache-tvm": model.tvm_version,
        FFI_PACKAGE: str(tvm_ffi.__version__),
    }


def _copy_licences(folder: Path) -> None:
    """Copy what the licences of the libraries and the loader ask to be passed on with them."""
    for name in ("apache-tvm", FFI_PACKAGE, "tvm-sparse"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # TVM's libraries alone, without its Python package
        for file in files:
            if file.name.startswith(("LICENSE", "NOTICE")):
                (folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(str(file.locate())), folder / name / file.name)


def _copy_cpp(folder: Path) -> None:
    import tvm_ffi

    with resources.as_file(resources.files("tvm_sparse.deployment") / "cpp") as sources:
        shutil.copytree(sources, folder, ignore=shutil.ignore_patterns("build*", "__pycache__"))
    for name in _HEADERS:
        header = folder / "include" / name
        header.parent.mkdir(parents=True)
        shutil.copy(Path(tvm_ffi.libinfo.find_include_path()) / name, header)


def _readme(model: Manifest, cpp: bool) -> str:
    target = ", ".join(f"{key} {value}" for key, value in model.target.items())
    lines = [
        "# A model, packaged by tvm_sparse",
        "",
        f"Compiled for {target}; {model.threads} thread(s).",
        "",
        *(f"- input `{describe(spec)}`" for spec in model.inputs),
        *(f"- output `{describe(spec)}`" for spec in model.outputs),
        "",
        "A size with a name is free; equal names in the inputs are equal sizes.",
        "",
        "Python, with NumPy and apache-tvm-ffi in the version that `manifest.json` names:",
        "",
        "```python",
        "import load  # this folder is on sys.path",
        "",
        "model = load.load()  # load.load(verify=True) compares all files with manifest.json first",
        "outputs = model.run({name: array})  # NumPy arrays by name; or model(array, ...)",
        "```",
        "",
    ]
    if cpp:
        lines += [
            "C++17, with nothing but a compiler:",
            "",
            "```sh",
            "cmake -S cpp -B build && cmake --build build",
            "# or: g++ -std=c++17 -O2 -Icpp -isystem cpp/include cpp/example.cpp -o example "
            "-ldl -pthread",
            "build/example . NAME=FILE.npy --output NAME=FILE.npy",
            "```",
            "",
        ]
    lines += [
        "Loading a library runs its code. A hash of `manifest.json` from a place that you trust,",
        'given as `verify="..."`, makes sure that every file is the one that was packaged.',
        "",
    ]
    return "\n".join(lines)


def _check_replaceable(place: Path, source: Any, force: bool) -> None:
    """Refuse to replace what no package wrote, unless that is wished."""
    if not place.parent.is_dir():
        raise LibraryError(f"there is no folder '{place.parent}' to put '{place.name}' into")
    if not place.exists():
        return
    inside = [Path.cwd(), Path(os.path.expanduser("~"))]
    if not isinstance(source, CompiledModule):
        inside.append(Path(os.path.realpath(source)))
    for path in inside:
        if path.is_relative_to(place):
            raise LibraryError(f"'{place}' is not replaced: '{path}' is in it")
    if not force:
        _check_is_package(place)


def _check_is_package(place: Path) -> None:
    hint = "choose another folder, or --force to replace it with all that is in it"
    if not place.is_dir():
        raise LibraryError(f"'{place}' is there already and is no folder; {hint}")
    if not any(place.iterdir()):
        return
    try:
        files: Mapping[str, PackedFile] = read_package_manifest(place / MANIFEST).files
    except LibraryError:
        raise LibraryError(f"'{place}' is there already and is no package; {hint}") from None
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        if path.is_dir() or name.as_posix() in (*files, MANIFEST) or "__pycache__" in name.parts:
            continue
        raise LibraryError(f"'{place}' holds '{name}', which no package wrote; {hint}")


def _replace(place: Path, made: Path, older: Path) -> None:
    """Put a folder in its place; what was there is back when that fails."""
    if place.exists():
        os.rename(place, older)
    try:
        os.rename(made, place)
    except OSError:
        if older.exists():
            os.rename(older, place)
        raise
