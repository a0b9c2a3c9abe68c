"""What a package says of itself: its files with their hashes, and the model in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import LibraryError
from .manifest import Manifest, take_field
from .plain_data import parse_json

MANIFEST = "manifest.json"

# Says what kind of JSON file it is, and in which version of the format.
KIND, VERSION = "tvm_sparse package", 1

_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")
_CHUNK_BYTES = 1 << 20

Verify = bool | str | os.PathLike[str]


@dataclass(frozen=True)
class PackedFile:
    """One file of a package: its SHA-256 in hexadecimal, and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class PackageManifest:
    """What stands in the manifest.json of a package.

    Attributes
    ----------
    library : str
        The name of the model's library among the files.
    versions : mapping of str to str
        Of the Python packages that made it, by their names at PyPI.
    files : mapping of str to PackedFile
        Every file but manifest.json, by its path in the folder, written with slashes.
    cpu_flags : mapping of str to str
        Instruction sets that the code may use, each with the word for it in /proc/cpuinfo.
    model : Manifest
        The library's own manifest, without plan, report and the names of layers.
    """

    library: str
    versions: Mapping[str, str]
    files: Mapping[str, PackedFile]
    cpu_flags: Mapping[str, str]
    model: Manifest

    def to_json(self) -> str:
        """Write the manifest as indented JSON, to be read by people too."""
        data = {
            "kind": KIND,
            "version": VERSION,
            "library": self.library,
            "versions": dict(self.versions),
            "files": {name: vars(file) for name, file in self.files.items()},
            "cpu_flags": dict(self.cpu_flags),
            "model": replace(self.model, plan={}, report={}, kernels={}).to_data(),
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PackageManifest:
        """Read what `to_json` wrote.

        Raises
        ------
        LibraryError
            When the text is something else, of a newer version, or lacks a field.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise LibraryError(f"it is not valid JSON: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise LibraryError("it is not the manifest of a package")
        if data.get("version") != VERSION:
            raise LibraryError(
                f"it has version {data.get('version')}, and this version of tvm_sparse reads "
                f"version {VERSION}"
            )
        manifest = cls(
            library=take_field(data, "library", str),
            versions=_strings(take_field(data, "versions", dict), "versions"),
            files=_files(take_field(data, "files", dict)),
            cpu_flags=_strings(take_field(data, "cpu_flags", dict), "cpu_flags"),
            model=Manifest.from_data(take_field(data, "model", dict)),
        )
        if manifest.library not in manifest.files:
            raise LibraryError(f"its list of files lacks the library '{manifest.library}'")
        return manifest


def read_package_manifest(path: Path) -> PackageManifest:
    """Read a manifest.json.

    Raises
    ------
    LibraryError
        When it cannot be read, or is none.
    """
    try:
        return PackageManifest.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LibraryError(f"cannot read '{path}': {error.strerror or error}") from None
    except (LibraryError, UnicodeDecodeError) as error:
        raise LibraryError(f"'{path}' is no manifest of a package: {error}") from None


def library_of(folder: Path) -> Path:
    """Find the library in the folder of a package.

    Raises
    ------
    LibraryError
        When the folder is no package.
    """
    return folder / read_package_manifest(folder / MANIFEST).library


def sha256_of(path: Path) -> str:
    """Hash a file.

    Raises
    ------
    LibraryError
        When it cannot be read.
    """
    state = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                state.update(chunk)
    except OSError as error:
        raise LibraryError(f"cannot read '{path}': {error.strerror or error}") from None
    return state.hexdigest()


def verify_files(place: Path, verify: Verify) -> None:
    """Compare a library, or all files of a package, with the hashes that they should have.

    Parameters
    ----------
    place : Path
        The library or the package's folder.
    verify : bool, str or path
        See `load_module`.

    Raises
    ------
    LibraryError
        With the name of the first file that differs, is missing, or is a library that the manifest
        does not list.
    """
    if verify is False:
        return
    folder = place if place.is_dir() else place.parent
    own = folder / MANIFEST
    if isinstance(verify, str) and _SHA256.match(verify):
        _check_hash(own if place.is_dir() else place, verify, "the one that was asked for")
        if not place.is_dir():
            return
        verify = True
    trusted = own if isinstance(verify, bool) else Path(verify)
    files = read_package_manifest(trusted).files
    if place.is_dir():
        if trusted != own:
            _check_hash(own, sha256_of(trusted), f"that of '{trusted}'")
        _check_listed(folder, files)
        for name, file in files.items():
            _check_hash(folder / name, file.sha256, f"the one in '{trusted}'")
    elif place.name in files:
        _check_hash(place, files[place.name].sha256, f"the one in '{trusted}'")
    else:
        raise LibraryError(f"'{trusted}' lists no file '{place.name}' to verify it by")


def _check_hash(path: Path, wanted: str, whose: str) -> None:
    found = sha256_of(path)
    if found != wanted.lower():
        raise LibraryError(
            f"'{path}' was changed or is another file: its SHA-256 {found} is not {whose}, {wanted}"
        )


def _check_listed(folder: Path, files: Mapping[str, PackedFile]) -> None:
    """Refuse a library that was put beside the others: they would load it in the system's place."""
    for path in sorted(folder.rglob("*.so*")):
        name = path.relative_to(folder).as_posix()
        if name not in files and not path.is_dir():
            raise LibraryError(f"'{path}' is not among the files that the manifest lists")


def _files(data: Mapping[str, Any]) -> dict[str, PackedFile]:
    files = {}
    for name, entry in data.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise LibraryError(f"its file '{name}' would lie outside the folder")
        if not isinstance(entry, dict):
            raise LibraryError("the library's manifest has a broken 'files'")
        digest = take_field(entry, "sha256", str)
        if not _SHA256.match(digest):
            raise LibraryError(f"the SHA-256 of '{name}' is not one: '{digest}'")
        files[name] = PackedFile(digest.lower(), take_field(entry, "bytes", int))
    return files


def _strings(data: Mapping[str, Any], key: str) -> dict[str, str]:
    if not all(isinstance(value, str) for value in data.values()):
        raise LibraryError(f"the library's manifest has a broken '{key}'")
    return dict(data)
