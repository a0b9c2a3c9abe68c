"""An exported library, opened: checked before a byte of it runs."""

from __future__ import annotations

import os
import platform
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .cpu_features import missing_features, processor_name
from .cuda_toolkit import has_gpu
from .errors import LibraryError, SparseError, TargetError
from .manifest import Manifest

Opened = TypeVar("Opened")

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


def open_library(file: Path, manifest: Manifest, wrap: Callable[[Any], Opened]) -> Opened:
    """Load a library that was checked, into a process that has TVM's runtime.

    Parameters
    ----------
    file : Path
        With a folder in its name: without one, the loader would look among the system's libraries.
    manifest : Manifest
        The library's own.
    wrap : callable
        Makes of the loaded library what is returned.

    Raises
    ------
    LibraryError
        When the library cannot be loaded or initialised.
    """
    import tvm_ffi

    try:
        with without_chatter(), _fresh_name(file) as link:
            library = tvm_ffi.load_module(str(link))
        return wrap(library)
    except SparseError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LibraryError(
            f"'{file}' cannot be loaded (it was built with TVM {manifest.tvm_version}): {lines[0]}"
        ) from error


@contextmanager
def _fresh_name(file: Path) -> Iterator[Path]:
    """Link to a file under a name that the loader has not seen.

    It knows libraries by name first: of a file that was replaced since, it would hand out the old
    one, as long as something of that is alive.
    """
    with tempfile.TemporaryDirectory(prefix="tvm-sparse-") as folder:
        link = Path(folder) / file.name
        link.symlink_to(file.resolve())
        yield link


@contextmanager
def without_chatter() -> Iterator[None]:
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


def check_file(file: Path) -> None:
    """Refuse what is no whole shared library for this kind of processor.

    Raises
    ------
    LibraryError, TargetError
    """
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
    if segment_count and segment_size != _ELF_SEGMENT.size:
        raise LibraryError(f"'{file}' is damaged: its segments have {segment_size} bytes of header")
    end = max(sections + section_size * section_count, segments + segment_size * segment_count)
    if end <= size:
        stream.seek(segments)
        for _ in range(segment_count):
            entry = _ELF_SEGMENT.unpack(stream.read(segment_size))
            end = max(end, entry[2] + entry[5])
    if end > size:
        raise LibraryError(f"'{file}' is truncated: {size} bytes are left of at least {end}")


def check_processor(file: Path, manifest: Manifest) -> None:
    """Refuse a library that needs what this machine lacks.

    Raises
    ------
    TargetError
    """
    lacking = missing_features(manifest.cpu_features)
    if lacking:
        raise TargetError(lacking_sentence(f"'{file}'", lacking))
    refusal = lacking_gpu(manifest)
    if refusal:
        raise TargetError(f"'{file}': {refusal}")


def lacking_gpu(manifest: Manifest) -> str | None:
    """Say that a GPU is needed and missing; None where all is well."""
    if manifest.target.get("kind") != "cuda" or has_gpu():
        return None
    arch = manifest.target.get("arch")
    return f"the module runs on an NVIDIA GPU ({arch} or later), and this machine has none"


def lacking_sentence(subject: str, lacking: list[str]) -> str:
    """Say which instruction sets this machine lacks."""
    return (
        f"{subject} needs instructions that this machine ({processor_name()}) lacks: "
        f"{', '.join(lacking)}; compile for another target, for example x86-64-v3"
    )
