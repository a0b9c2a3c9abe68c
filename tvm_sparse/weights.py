"""Weights outside the virtual machine: read-only data of an exported library, used where it lies.

TVM's virtual machine copies its constants out of the library as it loads. Those that
`passes.take_out_constants` took out are asked for by a function instead: within the process that
compiled the model it is one of Python, and in a library it is compiled C, which sees parts of the
library as tensors. The system maps that memory from the file, once for all processes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .manifest import c_escape

WEIGHTS_FUNCTION = "tvm_sparse_weights"

# Smaller constants stay with the virtual machine: asking for one takes it a tenth of a microsecond.
LEAST_BYTES = 16 << 10

ALIGNMENT = 64

_SOURCE = Path(__file__).with_name("weights.c")

_offering = threading.Lock()


def nbytes(tensor: Any) -> int:
    """Count the bytes of a contiguous tensor."""
    size = tensor.dtype.itemsize
    for extent in tensor.shape:
        size *= int(extent)
    return size


@contextmanager
def offered(weights: Sequence[Any]) -> Iterator[None]:
    """Let a virtual machine that is initialised in the block find its weights in this process."""
    if not weights:
        yield
        return
    import tvm_ffi

    array = tvm_ffi.convert(list(weights))
    # The machine keeps the function that it has found; the name is free again for the next one.
    with _offering:
        tvm_ffi.register_global_func(WEIGHTS_FUNCTION, lambda: array, override=True)
        try:
            yield
        finally:
            tvm_ffi.registry.remove_global_func(WEIGHTS_FUNCTION)


def compile_weights(weights: Sequence[Any], folder: Path, cc: str | None) -> list[Path]:
    """Compile the object file that gives a library its weights.

    Its parts lie in `folder` meanwhile, where the library will be as large, and not among the
    system's temporary files.

    Returns
    -------
    list of Path
        What to link into the library; nothing without weights.

    Raises
    ------
    OSError
        When `folder` cannot be written to.
    RuntimeError
        What the compiler said.
    """
    if not weights:
        return []
    import tvm_ffi
    from tvm.support import cc as tvm_cc

    data, compiled = folder / "weights.bin", folder / "weights.o"
    offsets = _write_aligned(weights, data)
    (folder / "weights_table.h").write_text(_table(weights, offsets, data), encoding="ascii")
    headers = (str(folder), tvm_ffi.libinfo.find_include_path())
    options = ["-c", "-O2", *(f"-I{path}" for path in headers)]
    tvm_cc.create_shared(str(compiled), [str(_SOURCE)], options, cc)
    data.unlink()
    return [compiled]


def _write_aligned(weights: Sequence[Any], file: Path) -> list[int]:
    """Write the weights one after the other, and return where each begins."""
    offsets = []
    with open(file, "wb") as stream:
        for tensor in weights:
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            offsets.append(stream.tell())
            memory = (ctypes.c_char * nbytes(tensor)).from_address(tensor.data_ptr())
            stream.write(memory)
    return offsets


def _table(weights: Sequence[Any], offsets: Sequence[int], file: Path) -> str:
    shapes = [int(extent) for tensor in weights for extent in tensor.shape]
    types = [
        f"{{{tensor.dtype.type_code}, {tensor.dtype.bits}, {tensor.dtype.lanes}}}"
        for tensor in weights
    ]
    # Read twice: by the compiler as a string of C, and then by the assembler as one of its own.
    name = os.fsencode(file).replace(b"\\", rb"\\").replace(b'"', rb"\"")
    return "".join(
        f"#define WEIGHT_{key} {value}\n"
        for key, value in {
            "FILE": f'"{c_escape(name)}"',
            "COUNT": str(len(weights)),
            "SHAPES": _braced(shapes),
            "OFFSETS": _braced(offsets),
            "DIMENSIONS": _braced(len(tensor.shape) for tensor in weights),
            "TYPES": _braced(types),
        }.items()
    )


def _braced(values: Iterable[Any]) -> str:
    return f"{{{', '.join(map(str, values))}}}"
