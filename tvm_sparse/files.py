"""Files in and out: ONNX models, and outputs that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError, SparseError

if TYPE_CHECKING:
    import onnx

# A protobuf holds less than 2 GiB; some room is left for everything that is not weights.
LARGEST_PROTOBUF = 2**31 - 2**24


def home_folder() -> Path:
    """Tell where this package keeps what it may make again: `TVM_SPARSE_HOME`, or the user's cache.

    The folder need not exist.
    """
    home = os.environ.get("TVM_SPARSE_HOME")
    if home:
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tvm_sparse"


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there takes its place at the end.

    A link is followed, and what is no regular file (``/dev/null``, a pipe) is written to directly.

    Raises
    ------
    SparseError
        When the file cannot be written.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        yield place
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, place)
    except OSError as error:
        raise SparseError(f"'{place}' cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file by way of `written_beside`.

    Raises
    ------
    SparseError
        When the file cannot be written.
    """
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises
    ------
    ModelError
        When there is no such file, or it is not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from .onnx_check import check_model, check_tensors

    name = os.fspath(path)
    try:
        model = onnx.load(path)
    except FileNotFoundError as error:
        raise ModelError(f"there is no file '{error.filename or name}'") from None
    except DecodeError:
        raise ModelError(f"'{name}' is not an ONNX model, or it is cut off") from None
    except (OSError, OverflowError, ValueError, onnx.checker.ValidationError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot read '{name}': {lines[0]}") from None
    if not model.graph.node:
        raise ModelError(f"'{name}' is not an ONNX model: it holds no graph")
    check_model(model, f"'{name}'")
    check_tensors(model)
    return model


def save_onnx(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write an ONNX file; weights of 2 GiB and more go to ``<name>.data`` beside it.

    Raises
    ------
    SparseError
        When it cannot be written.
    """
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size < LARGEST_PROTOBUF:
        with written_beside(path) as temporary:
            temporary.write_bytes(model.SerializeToString())
    else:
        _save_in_two(model, Path(path))


def _save_in_two(model: onnx.ModelProto, place: Path) -> None:
    import onnx

    # Saving moves the weights out of the object that it is given.
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = f"{place.name}.data"
    try:
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=place.parent) as folder:
            # The model names its data file: both are written under their own names, elsewhere.
            onnx.save_model(
                copy, Path(folder, place.name), save_as_external_data=True, location=data
            )
            os.replace(Path(folder, data), place.with_name(data))
            os.replace(Path(folder, place.name), place)
    except OSError as error:
        raise SparseError(f"'{place}' cannot be written: {error.strerror or error}") from None
