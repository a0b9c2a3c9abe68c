"""Compiled libraries, kept between processes: each in a folder named by what decides it.

Several processes may use one cache at once. Whoever reads, writes or removes a library holds a lock
on it (`flock`), so that of several processes that want the same one, one compiles and the others
wait. A library appears by renaming its folder, whole or not at all, and its checksum is compared
before it is loaded. Removing one that a process has loaded is safe: the file loses its name, and
its pages stay until nobody maps them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SparseError
from .files import home_folder
from .plain_data import parse_json

DEFAULT_BYTES = 8 << 30
_LIBRARY, _ENTRY = "library.so", "entry.json"
# What a process that was killed left half-written is removed when it is as old as this.
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class CachedLibrary:
    """One library of a cache.

    Attributes
    ----------
    key : str
        The name of its folder.
    size : int
        Bytes of the library.
    used : float
        When it was last asked for, in seconds since 1970.
    about : mapping
        What its maker says of it: plain data.
    """

    key: str
    path: Path
    size: int
    used: float
    about: Mapping[str, Any]


class DamagedEntryError(SparseError):
    """A library of the cache is not what was written there."""


class LibraryCache:
    """A folder of compiled libraries, bounded in size.

    Parameters
    ----------
    folder : path, optional
        By default ``libraries`` in `home_folder`.
    limit : int, optional
        Bytes to keep, by default TVM_SPARSE_CACHE_BYTES, else 8 GiB. The library that was stored
        last stays, however large it is; with 0, nothing is to be kept.

    Raises
    ------
    SparseError
        When TVM_SPARSE_CACHE_BYTES is no number of bytes.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, limit: int | None = None
    ) -> None:
        self.folder = Path(folder) if folder is not None else home_folder() / "libraries"
        self.limit = _limit() if limit is None else limit

    def refusal(self) -> str | None:
        """Say why nothing can be kept here; None where it can."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return error.strerror or str(error)
        return None if os.access(self.folder, os.W_OK | os.X_OK) else "it is not writable"

    @contextmanager
    def locked(self, key: str, *, alone: bool) -> Iterator[None]:
        """Hold the lock of a library: alone to write it, or together with others to read it.

        Raises
        ------
        OSError
            When the folder cannot be written.
        """
        with self._lock(key, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
            yield

    def find(self, key: str) -> CachedLibrary | None:
        """Return a library after comparing its checksum; None when there is none.

        The caller holds its lock.

        Raises
        ------
        DamagedEntryError
            When it is there, and is not what was stored.
        """
        place = self.folder / key
        if not place.is_dir():
            return None
        try:
            entry = parse_json((place / _ENTRY).read_bytes())
            wanted, about = entry["sha256"], dict(entry["about"])
            found = _checksum(place / _LIBRARY)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedEntryError(f"it cannot be read ({type(error).__name__})") from None
        if found != wanted:
            raise DamagedEntryError("its checksum differs")
        with suppress(OSError):
            os.utime(place / _ENTRY)
        library = place / _LIBRARY
        return CachedLibrary(key, library, library.stat().st_size, time.time(), about)

    def store(
        self, key: str, write: Callable[[Path], None], about: Mapping[str, Any]
    ) -> CachedLibrary:
        """Keep a library, in place of one that may be there, and remove others beyond the limit.

        The caller holds its lock alone.

        Parameters
        ----------
        write : callable
            Writes the library to the path that it is given.
        about : mapping
            Plain data, for `entries`.

        Raises
        ------
        OSError
            When the folder cannot be written.
        """
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
        try:
            write(temporary / _LIBRARY)
            entry = {"sha256": _checksum(temporary / _LIBRARY), "about": dict(about)}
            (temporary / _ENTRY).write_text(json.dumps(entry), encoding="utf-8")
            self._discard(key)
            os.rename(temporary, self.folder / key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.shrink(keep=key)
        library = self.folder / key / _LIBRARY
        return CachedLibrary(key, library, library.stat().st_size, time.time(), about)

    def entries(self) -> list[CachedLibrary]:
        """List what is there, the longest unused first; what is damaged says nothing of itself.

        Another process may remove some of it while it is read.
        """
        found = []
        for place in self.folder.glob("*/" + _LIBRARY):
            if place.parent.name.startswith("."):
                continue
            with suppress(OSError):
                size, used, about = place.stat().st_size, place.stat().st_mtime, {}
                with suppress(OSError, ValueError, KeyError, TypeError):
                    entry = place.with_name(_ENTRY)
                    used = entry.stat().st_mtime
                    about = dict(parse_json(entry.read_bytes())["about"])
                found.append(CachedLibrary(place.parent.name, place, size, used, about))
        return sorted(found, key=lambda library: library.used)

    def shrink(self, keep: str = "") -> list[CachedLibrary]:
        """Remove the longest unused libraries until the rest fits; return what was removed.

        A library that a process is reading or writing at this moment is passed over.
        """
        self._remove_stale()
        libraries = self.entries()
        total = sum(library.size for library in libraries)
        removed = []
        for library in libraries:
            if total <= self.limit:
                break
            if library.key != keep and self._remove(library.key):
                total -= library.size
                removed.append(library)
        return removed

    def clear(self) -> list[CachedLibrary]:
        """Remove every library that no process is reading or writing; return what was removed."""
        return [library for library in self.entries() if self._remove(library.key)]

    def _remove(self, key: str) -> bool:
        try:
            with self._lock(key, fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
                self._discard(key)
                # Whoever waits for this lock sees that the file is another one, and opens that.
                lock.unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def _discard(self, key: str) -> None:
        """Take a library's folder out of sight at once, then remove it."""
        hidden = Path(tempfile.mkdtemp(prefix=".old-", dir=self.folder))
        with suppress(FileNotFoundError):
            os.rename(self.folder / key, hidden / key)
        shutil.rmtree(hidden, ignore_errors=True)

    def _remove_stale(self) -> None:
        for place in (*self.folder.glob(".new-*"), *self.folder.glob(".old-*")):
            with suppress(OSError):
                if time.time() - place.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)

    @contextmanager
    def _lock(self, key: str, how: int) -> Iterator[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.lock"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, how)
                if _is_still(path, descriptor):
                    yield path
                    return
            finally:
                os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Say whether a path names the file that was opened under it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _checksum(path: Path) -> str:
    state = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(1 << 24):
            state.update(block)
    return state.hexdigest()


def _limit() -> int:
    text = os.environ.get("TVM_SPARSE_CACHE_BYTES", "")
    if not text:
        return DEFAULT_BYTES
    if not (text.isdecimal() and len(text) <= 18):
        raise SparseError(f"TVM_SPARSE_CACHE_BYTES is a number of bytes, and '{text}' is none")
    return int(text)
