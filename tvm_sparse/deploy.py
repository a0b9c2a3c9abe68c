"""Out to a shared library, and back in: checked before a byte of it runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .cpu_features import missing_features
from .cuda_toolkit import load_cuda_runtime
from .device import CUDA, device_kind
from .errors import LibraryError
from .manifest import Manifest, read_manifest, to_c_source
from .opening import (
    check_file,
    check_processor,
    lacking_gpu,
    lacking_sentence,
    open_library,
    without_chatter,
)
from .package_manifest import Verify, library_of, verify_files
from .runtime import CompiledModule, load_runtime
from .weights import compile_weights, offered


def export(
    executable: Any,
    manifest: Manifest,
    path: str | os.PathLike[str],
    cc: str | None = None,
    weights: Sequence[Any] = (),
) -> None:
    """Link a VM executable and its manifest to one shared library.

    The file appears whole or not at all: it is written beside its place and renamed.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        What `tvm.compile` returned.
    manifest : Manifest
        What the library will say of itself.
    path : path
        The file to write; an older one is replaced.
    cc : str, optional
        The compiler that links; by default CXX, CC or the first of g++, gcc and clang.
    weights : sequence of tvm.runtime.Tensor
        What `take_out_constants` took out of the executable.

    Raises
    ------
    LibraryError
        When there is no compiler, linking fails, or the file cannot be written.
    """
    _need_compiler(cc)
    options = {"cc": cc} if cc else {}

    def link(folder: Path, library: Path) -> None:
        source = folder / "manifest.c"
        source.write_text(to_c_source(manifest))
        addons = [source, *compile_weights(weights, folder, cc)]
        # A fresh list: export_library appends its own object files to it.
        with without_chatter():
            executable.export_library(str(library), addons=list(map(str, addons)), **options)

    _write_beside(Path(path), link)


def load_module(
    path: str | os.PathLike[str],
    threads: int | None = None,
    verify: Verify = False,
    *,
    cpus: Sequence[int] | None = None,
    instances: int | None = None,
) -> CompiledModule:
    """Load an exported library; needs TVM's runtime and neither its compiler nor the `tvm` package.

    Loading a library runs its code. What it is checked for without `verify` saves from accidents,
    not from an author who means harm.

    Parameters
    ----------
    path : path
        A file that `export` wrote, or a folder that `package` wrote; of that, the installed TVM's
        runtime runs the library.
    threads : int, optional
        Threads to run on; see `CompiledModule`.
    verify : bool, str or path
        Refuses files that were changed before any of them is loaded. True compares them with the
        manifest.json of the package that they are in; a path names another manifest to trust. A
        SHA-256 in hexadecimal is that of the library, or of a folder's manifest.json, which has
        those of all files in it.
    cpus : sequence of int, optional
        The cores to run on; see `Runner`.
    instances : int, optional
        Calls that run at the same time, from several threads; see `Runner`.

    Returns
    -------
    CompiledModule
        Ready to run.

    Raises
    ------
    LibraryError
        When the file is missing, truncated, no shared library, not exported by this package, or
        not the one that `verify` asks for.
    TargetError
        When the library was built for another processor, or this machine lacks instructions.
    """
    # Without a folder in its name, the loader would look for the file among the system's libraries.
    place = Path(os.path.abspath(path))
    verify_files(place, verify)
    file = library_of(place) if place.is_dir() else place
    check_file(file)
    manifest = read_manifest(file)
    check_processor(file, manifest)
    load_runtime()
    if device_kind(manifest.target) == CUDA:
        load_cuda_runtime()
    return open_library(
        file,
        manifest,
        lambda library: CompiledModule(
            library,
            manifest,
            threads,
            partial(_copy_library, file),
            cpus=cpus,
            instances=instances,
        ),
    )


def wrap_executable(
    executable: Any,
    manifest: Manifest,
    threads: int | None = None,
    weights: Sequence[Any] = (),
) -> CompiledModule:
    """Make a runnable module of a freshly built VM executable.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        What `tvm.compile` returned.
    manifest : Manifest
        What the module says of itself, also when it is exported.
    threads : int, optional
        Threads to run on; see `CompiledModule`.
    weights : sequence of tvm.runtime.Tensor
        What `take_out_constants` took out of the executable.

    Returns
    -------
    CompiledModule
        Where this machine lacks instructions that the executable was built for, the module can be
        exported, and refuses to run.
    """
    exporter = partial(export, executable, manifest, weights=weights)
    lacking = missing_features(manifest.cpu_features)
    refusal = lacking_sentence("the module", lacking) if lacking else lacking_gpu(manifest)
    library = None if refusal else executable.jit()
    source = _cuda_source(executable.mod)
    making = partial(offered, weights)
    return CompiledModule(library, manifest, threads, exporter, refusal, source, making=making)


def _cuda_source(module: Any) -> str | None:
    """Find the CUDA source among the modules that a module imports."""
    if module.kind == "cuda":
        return str(module.inspect_source("cuda"))
    return next(filter(None, map(_cuda_source, module.imports)), None)


def _need_compiler(cc: str | None) -> None:
    from tvm.support import cc as tvm_cc

    name = cc or tvm_cc.get_cc()
    if name is None or shutil.which(name) is None:
        found = f"'{name}' was not found" if name else "none was found"
        raise LibraryError(
            f"exporting needs a C compiler to link with, and {found}; install g++ or clang"
        )


def _write_beside(path: Path, write: Callable[[Path, Path], None]) -> None:
    if path.is_dir():
        raise LibraryError(f"cannot write '{path}': it is a folder")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
            library = Path(name) / "library.so"
            write(Path(name), library)
            os.replace(library, path)
    except OSError as error:
        raise LibraryError(f"cannot write '{path}': {error.strerror or error}") from None
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise LibraryError(f"cannot write '{path}': the linker said: {_telling(lines)}") from error


def _telling(lines: list[str]) -> str:
    """Pick the line that names the cause: linkers end with a summary that does not."""
    return next((line for line in lines if "error" in line.lower() and line[-1] != ":"), lines[-1])


def _copy_library(source: Path, path: Path) -> None:
    if path.exists() and path.samefile(source):
        return

    def copy(_folder: Path, library: Path) -> None:
        shutil.copyfile(source, library)

    _write_beside(path, copy)
