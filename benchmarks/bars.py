"""The hand-written bars of `bars/`: compiled when first asked for, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tvm_sparse.runtime import aligned_empty

SOURCES = Path(__file__).parent / "bars"
FLAGS: dict[int, tuple[str, ...]] = {
    16: ("-march=native", "-DLANES=16"),
    8: ("-mavx2", "-mfma", "-DLANES=8"),
}
# Five that describe the candidate, and address and bytes of six arrays.
_NUMBERS = 5 + 2 * 6
# What a tile of a convolution may read behind the last image.
_SLACK = 4096


@lru_cache
def library(lanes: int) -> ctypes.CDLL:
    """Compile the bars for a vector width (16: AVX-512, 8: AVX2), and load them.

    Raises
    ------
    RuntimeError
        When the compiler is missing or fails.
    """
    sources = sorted(SOURCES.glob("*.cpp"))
    flags = ["-O3", "-std=c++17", *FLAGS[lanes]]
    texts = [path.read_bytes() for path in [*sources, *sorted(SOURCES.glob("*.h"))]]
    digest = hashlib.sha256(b"".join(texts) + " ".join(flags).encode()).hexdigest()[:12]
    target = SOURCES / "build" / f"bars{lanes}-{digest}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        draft = target.with_suffix(".draft.so")
        command = ["g++", *flags, "-shared", "-fPIC", "-o", str(draft), *map(str, sources)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"the bars need g++: {error}") from None
        if done.returncode:
            raise RuntimeError(f"g++ does not compile the bars:\n{done.stderr}")
        draft.rename(target)
    return _declared(ctypes.CDLL(str(target)))


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, whole = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, dimensions in {"spmm": 3, "conv": 6}.items():
        signatures = {
            "problem": (pointer, [whole] * dimensions + [pointer]),
            "problem_free": (None, [pointer]),
            "candidates": (whole, [pointer]),
            "create": (pointer, [pointer, whole]),
            "free": (None, [pointer]),
            "describe": (None, [pointer, pointer]),
            "run": (None, [pointer] * 3),
            "fastest": (ctypes.c_double, [pointer] * 3 + [whole]),
        }
        for verb, (result, arguments) in signatures.items():
            function = getattr(lib, f"{name}_{verb}")
            function.restype, function.argtypes = result, arguments
    lib.limit_fma_gflops.restype = ctypes.c_double
    lib.limit_read_gbytes.restype, lib.limit_read_gbytes.argtypes = ctypes.c_double, [size]
    lib.flush_buffer.restype, lib.flush_buffer.argtypes = None, [pointer, size]
    lib.walk.restype, lib.walk.argtypes = ctypes.c_uint64, [pointer, size]
    lib.nothing.restype = None
    return lib


@dataclass(frozen=True)
class Tile:
    """What a candidate of a bar looks like; `plane` and `rows` describe its output."""

    mr: int
    nt: int
    kb: int
    plane: int
    rows: int

    def __str__(self) -> str:
        return f"MR{self.mr} NT{self.nt} KB{self.kb}"


class Bar:
    """One weight, at one candidate, with its input and output in the bar's own layouts.

    `like` is a bar of the same candidate whose input and output this one works on.
    """

    def __init__(self, problem: Problem, index: int, like: Bar | None = None) -> None:
        self.problem, self.index = problem, index
        self.name, self.library = problem.name, problem.library
        self.handle = ctypes.c_void_p(self._function("create")(problem.handle, index))
        numbers = (ctypes.c_int64 * _NUMBERS)()
        self._function("describe")(self.handle, numbers)
        self.tile = Tile(*numbers[:5])
        self.weight = [_view(*pair) for pair in zip(numbers[5::2], numbers[6::2], strict=True)]
        self.x, self.y = (like.x, like.y) if like else problem.buffers(self.tile)
        self.arguments = (
            self.handle,
            ctypes.c_void_p(self.x.ctypes.data),
            ctypes.c_void_p(self.y.ctypes.data),
        )
        self.call = partial(self._function("run"), *self.arguments)

    def _function(self, verb: str) -> Any:
        return getattr(self.library, f"{self.name}_{verb}")

    def buffers(self) -> list[np.ndarray]:
        """Return all that a call reads and writes."""
        return [self.x, self.y, *self.weight]

    def fastest(self, calls: int) -> float:
        """Return the seconds of the fastest of several calls."""
        return self._function("fastest")(*self.arguments, calls)

    def output(self) -> np.ndarray:
        """Return the last call's result in the problem's own layout."""
        return self.problem.unpacked(self.y, self.tile)

    def __del__(self) -> None:
        self._function("free")(self.handle)


class Problem:
    """A weight and an input that bars can be made for; subclasses know the layouts."""

    name: str

    def __init__(self, weight: np.ndarray, x: np.ndarray, lanes: int, sizes: Sequence[int]) -> None:
        self.lanes, self.library = lanes, library(lanes)
        self.x = x
        weight = np.ascontiguousarray(weight, np.float32)
        make = getattr(self.library, f"{self.name}_problem")
        self.handle = ctypes.c_void_p(make(*sizes, weight.ctypes.data))

    def __len__(self) -> int:
        return getattr(self.library, f"{self.name}_candidates")(self.handle)

    def __getitem__(self, index: int) -> Bar:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Bar(self, index)

    def best(self, calls: int = 25) -> Bar:
        """Time every candidate, the six most promising ones for longer, and return the fastest."""
        times = {index: bar.fastest(5) for index, bar in enumerate(self)}
        promising = sorted(times, key=times.__getitem__)[:6]
        return min((self[index] for index in promising), key=lambda bar: bar.fastest(calls))

    def buffers(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """Return the input in the layout that a tile wants, and room for its output."""
        raise NotImplementedError

    def unpacked(self, y: np.ndarray, tile: Tile) -> np.ndarray:
        """Return a result in the problem's own layout."""
        raise NotImplementedError

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            getattr(self.library, f"{self.name}_problem_free")(self.handle)


class Matmul(Problem):
    """Y[n, m] = X[n, k] W[m, k]^T, the weight given as [m, k]."""

    name = "spmm"

    def __init__(self, weight: np.ndarray, x: np.ndarray, lanes: int) -> None:
        super().__init__(weight, x, lanes, (*weight.shape, len(x)))
        self.m = len(weight)

    def buffers(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """Cut tokens into panels [panel][k][tokens]."""
        panels = to_panels(self.x, self.lanes * tile.nt)
        return panels, zeros((len(panels), tile.rows, panels.shape[2]))

    def unpacked(self, y: np.ndarray, tile: Tile) -> np.ndarray:
        """Return [n, m]."""
        return from_panels(y, len(self.x))[:, : self.m]


class Conv(Problem):
    """A stride-1 "same" convolution; the weight as OIHW, images as NCHW."""

    name = "conv"

    def __init__(self, weight: np.ndarray, x: np.ndarray, lanes: int) -> None:
        (out, channels, kernel, _), (batch, _, height, width) = weight.shape, x.shape
        super().__init__(weight, x, lanes, (batch, channels, height, width, out, kernel))
        self.out, self.pad = out, kernel // 2

    def buffers(self, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
        """Pad the images."""
        around = (self.pad, self.pad)
        padded = np.pad(self.x, ((0, 0), (0, 0), around, around))
        room = zeros((padded.size + _SLACK,))
        room[: padded.size] = padded.reshape(-1)
        return room, zeros((len(padded), tile.rows, tile.plane))

    def unpacked(self, y: np.ndarray, tile: Tile) -> np.ndarray:
        """Cut the pixels out of the padded rows."""
        batch, _, height, width = self.x.shape
        wide = width + 2 * self.pad
        missing = max(0, height * wide - y.shape[2])
        rows = np.pad(y[:, : self.out], ((0, 0), (0, 0), (0, missing)))
        return rows[..., : height * wide].reshape(batch, self.out, height, wide)[..., :width]


def _view(address: int, size: int) -> np.ndarray:
    """Show memory that the library owns as bytes."""
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)


def nothing(bar: Bar) -> partial[None]:
    """Return a call with a bar's arguments that does nothing."""
    return partial(bar.library.nothing, *bar.arguments)


def zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Return aligned float32 zeros whose pages are there."""
    array = aligned_empty(shape, np.dtype(np.float32))
    array[...] = 0
    return array


def to_panels(x: np.ndarray, width: int) -> np.ndarray:
    """Lay out [n, k] as [ceil(n / width), k, width], with zeros behind the last token."""
    n, k = x.shape
    count = -(-n // width)
    padded = np.zeros((count * width, k), np.float32)
    padded[:n] = x
    panels = zeros((count, k, width))
    panels[...] = padded.reshape(count, width, k).transpose(0, 2, 1)
    return panels


def from_panels(y: np.ndarray, n: int) -> np.ndarray:
    """Undo `to_panels`."""
    count, m, width = y.shape
    return y.transpose(0, 2, 1).reshape(count * width, m)[:n]
