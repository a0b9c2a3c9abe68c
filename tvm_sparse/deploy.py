"""Out to a shared library, and back in: checked before a byte of it runs."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from .cpu_features import missing_features, processor_name
from .cuda_toolkit import has_gpu, load_cuda_runtime
from .device import CUDA, device_kind
from .errors import LibraryError, SparseError, TargetError
from .manifest import Manifest, read_manifest, to_c_source
from .runtime import CompiledModule, load_runtime

# ELF's e_machine -> platform.machine().
_ELF_MACHINES: dict[int, tuple[str, ...]] = {
    0x3E: ("x86_64", "amd64"),
    0xB7: ("aarch64", "arm64"),
    0xF3: ("riscv64",),
    0x28: ("armv7l", "armv6l"),
}
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF_SEGMENT = struct.Struct("<IIQQQQQQ")
_SHARED_OBJECT = 3

# Lines that TVM 0.27 writes to stderr for every library that it saves or loads, whatever is in it.
_CHATTER = (b"Warning: Scope Saving:", b"Warning: Scope Loaded:")
_stderr_lock = threading.Lock()

_OTHER_LIBRARY_MAGICS = (b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"MZ")


def export(
    executable: Any, manifest: Manifest, path: str | os.PathLike[str], cc: str | None = None
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
        # A fresh list: export_library appends its own object files to it.
        with _without_chatter():
            executable.export_library(str(library), addons=[str(source)], **options)

    _write_beside(Path(path), link)


def load_module(path: str | os.PathLike[str], threads: int | None = None) -> CompiledModule:
    """Load an exported library; needs TVM's runtime and neither its compiler nor the `tvm` package.

    Parameters
    ----------
    path : path
        A file that `export` wrote.
    threads : int, optional
        Threads to run on; see `CompiledModule`.

    Returns
    -------
    CompiledModule
        Ready to run.

    Raises
    ------
    LibraryError
        When the file is missing, truncated, no shared library, or not exported by this package.
    TargetError
        When the library was built for another processor, or this machine lacks instructions.
    """
    # Without a folder in its name, the loader would look for the file among the system's libraries.
    file = Path(os.path.abspath(path))
    _check_file(file)
    manifest = read_manifest(file)
    _check_processor(file, manifest)
    load_runtime()
    if device_kind(manifest.target) == CUDA:
        load_cuda_runtime()
    import tvm_ffi

    try:
        with _without_chatter(), _fresh_name(file) as link:
            library = tvm_ffi.load_module(str(link))
        return CompiledModule(library, manifest, threads, partial(_copy_library, file))
    except SparseError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LibraryError(
            f"'{file}' cannot be loaded (it was built with TVM {manifest.tvm_version}): {lines[0]}"
        ) from error


def wrap_executable(
    executable: Any, manifest: Manifest, threads: int | None = None
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

    Returns
    -------
    CompiledModule
        Where this machine lacks instructions that the executable was built for, the module can be
        exported, and refuses to run.
    """
    exporter = partial(export, executable, manifest)
    lacking = missing_features(manifest.cpu_features)
    refusal = _lacking_sentence("the module", lacking) if lacking else _lacking_gpu(manifest)
    library = None if refusal else executable.jit()
    source = _cuda_source(executable.mod)
    return CompiledModule(library, manifest, threads, exporter, refusal, source)


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


@contextmanager
def _fresh_name(file: Path) -> Iterator[Path]:
    """Link to a file under a name that the loader has not seen.

    It knows libraries by name first: of a file that was replaced since, it would hand out the old
    one, as long as something of that is alive.
    """
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-") as folder:
        link = Path(folder) / file.name
        link.symlink_to(file)
        yield link


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold the process's stderr back for a moment, and pass on all but the lines of `_CHATTER`."""
    with _stderr_lock, tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:
            # A process without a stderr has nothing to keep clean.
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            lines = [line for line in held if not line.strip().endswith(_CHATTER)]
            with suppress(OSError):
                os.write(2, b"".join(lines))


def _copy_library(source: Path, path: Path) -> None:
    if path.exists() and path.samefile(source):
        return

    def copy(_folder: Path, library: Path) -> None:
        shutil.copyfile(source, library)

    _write_beside(path, copy)


def _check_file(file: Path) -> None:
    try:
        with open(file, "rb") as stream:
            head = stream.read(_ELF_HEADER.size)
            size = os.fstat(stream.fileno()).st_size
            if head[:4] == b"\x7fELF":
                _check_elf(file, head, size, stream)
            elif not head.startswith(_OTHER_LIBRARY_MAGICS):
                raise LibraryError(f"'{file}' is not a shared library")
    except OSError as error:
        raise LibraryError(f"cannot read '{file}': {error.strerror or error}") from None


def _check_elf(file: Path, head: bytes, size: int, stream: Any) -> None:
    """Refuse what the loader would crash on: a mapped page past the end of the file is a SIGBUS."""
    if len(head) < _ELF_HEADER.size:
        raise LibraryError(f"'{file}' is truncated: {size} bytes are left")
    if head[4] != 2 or head[5] != 1:
        raise TargetError(f"'{file}' is not a 64-bit little-endian library")
    fields = _ELF_HEADER.unpack(head)
    kind, machine, segments, sections = fields[1], fields[2], fields[5], fields[6]
    segment_size, segment_count, section_size, section_count = fields[9:13]
    if kind != _SHARED_OBJECT:
        raise LibraryError(f"'{file}' is not a shared library, but another kind of ELF file")
    names = _ELF_MACHINES.get(machine, ("unknown",))
    if platform.machine().lower() not in names:
        raise TargetError(
            f"'{file}' is for {names[0]} processors, and this machine is {platform.machine()}"
        )
    end = max(sections + section_size * section_count, segments + segment_size * segment_count)
    if end <= size:
        stream.seek(segments)
        for _ in range(segment_count):
            entry = _ELF_SEGMENT.unpack(stream.read(segment_size)[: _ELF_SEGMENT.size])
            end = max(end, entry[2] + entry[5])
    if end > size:
        raise LibraryError(f"'{file}' is truncated: {size} bytes are left of at least {end}")


def _check_processor(file: Path, manifest: Manifest) -> None:
    lacking = missing_features(manifest.cpu_features)
    if lacking:
        raise TargetError(_lacking_sentence(f"'{file}'", lacking))
    refusal = _lacking_gpu(manifest)
    if refusal:
        raise TargetError(f"'{file}': {refusal}")


def _lacking_gpu(manifest: Manifest) -> str | None:
    if manifest.target.get("kind") != "cuda" or has_gpu():
        return None
    arch = manifest.target.get("arch")
    return f"the module runs on an NVIDIA GPU ({arch} or later), and this machine has none"


def _lacking_sentence(subject: str, lacking: list[str]) -> str:
    return (
        f"{subject} needs instructions that this machine ({processor_name()}) lacks: "
        f"{', '.join(lacking)}; compile for another target, for example x86-64-v3"
    )
