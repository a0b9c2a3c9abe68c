"""The frame of every kernel without a weight: parameters, flat views, one root block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as B

from ...errors import SparseError
from ..vectors import Vectors

# A dimension is a number, or the name of a symbolic one; equal names are equal numbers.
Dim = int | str

# A parallel loop costs a microsecond while TVM's threads are awake, and they are from the first
# kernel of a run to its last; below this much work on one core the second thread does not pay.
PARALLEL_MICROSECONDS = 4.0


class UnsupportedShapeError(SparseError):
    """A template cannot be built for these shapes; the operator is left to TVM."""


class Tensor:
    """A parameter: its dimensions as expressions, and a flat view once the body is open."""

    def __init__(self, buffer: Any, shape: Sequence[Any]) -> None:
        self.buffer = buffer
        self.shape = list(shape)
        self.flat: Any = None


class DenseKernel:
    """Builds one PrimFunc that `call_tir` takes, from float32 tensors to float32 tensors.

    Parameters
    ----------
    name : str
        The function's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._symbols: dict[str, Any] = {}
        self._tensors: list[Tensor] = []

    def dim(self, dim: Dim) -> Any:
        """Return a dimension as an int64 expression."""
        if isinstance(dim, int):
            return T.int64(dim)
        if dim not in self._symbols:
            self._symbols[dim] = T.int64()
        return self._symbols[dim]

    def tensor(self, name: str, shape: Sequence[Dim]) -> Tensor:
        """Declare the next parameter."""
        if any(dim == 0 for dim in shape):
            raise UnsupportedShapeError(f"the tensor {name} of {self.name} is empty")
        exprs = [self.dim(dim) for dim in shape]
        if all(isinstance(dim, int) for dim in shape):
            buffer = B.arg(name, B.buffer(exprs, "float32"))
        else:
            buffer = B.match_buffer(B.arg(f"{name}_handle", T.handle()), exprs, "float32")
        tensor = Tensor(buffer, exprs)
        self._tensors.append(tensor)
        return tensor

    @contextmanager
    def body(self) -> Iterator[None]:
        """Open the root block, in which the flat views are valid."""
        with B.sblock("root"):
            B.reads([])
            B.writes([])
            for tensor in self._tensors:
                total = product(tensor.shape)
                tensor.flat = B.decl_buffer((total,), "float32", data=tensor.buffer.data)
            yield


@contextmanager
def dense_kernel(name: str, result: list[Any]) -> Iterator[DenseKernel]:
    """Build a kernel in a `with` block; the PrimFunc is appended to `result` at its end."""
    with IRBuilder() as builder:
        with B.prim_func(is_private=True, s_tir=True):
            B.func_name(name)
            # 8 is "opaque": operator fusion leaves the kernel alone.
            B.func_attr({"tirx.noalias": True, "op_pattern": 8, "tvm_sparse.dense": name})
            yield DenseKernel(name)
    result.append(builder.get())


def product(dims: Sequence[Any]) -> Any:
    """Multiply dimensions: an int64 expression, 1 for none."""
    total = T.int64(1)
    for dim in dims:
        total = total * dim
    return total


def static_product(dims: Sequence[Dim]) -> int | None:
    """Multiply dimensions when all are numbers."""
    if all(isinstance(dim, int) for dim in dims):
        return math.prod(dim for dim in dims if isinstance(dim, int))
    return None


def outer_loop(extent: Any, microseconds: float | None, threads: int) -> Any:
    """Loop over threads when the work is worth it; `microseconds` is None when it is unknown."""
    big = microseconds is None or microseconds > PARALLEL_MICROSECONDS
    return thread_loop(extent, threads if big else 1)


def thread_loop(extent: Any, threads: int) -> Any:
    """Loop over threads if there are several."""
    return (B.parallel if threads > 1 else B.serial)(0, extent)


def fold_lanes(vectors: Vectors, value: Any, combine: Any) -> Any:
    """Combine all lanes of a vector by a butterfly; every lane of the result holds the total."""
    from tvm import tirx

    step = vectors.lanes // 2
    while step:
        kept = vectors.keep(value)
        swapped = tirx.Shuffle([kept, kept], [lane ^ step for lane in range(vectors.lanes)])
        value = combine(kept, swapped)
        step //= 2
    return vectors.keep(value)


def load_padded(vectors: Vectors, tensor: Any, base: Any, count: Any, padding: float) -> Any:
    """Read the first `count` lanes, `padding` behind; nothing else is touched."""
    return T.call_llvm_intrin(
        f"float32x{vectors.lanes}",
        "llvm.masked.load",
        T.address_of(tensor[base]),
        vectors.mask(count),
        vectors.splat(T.float32(padding)),
    )


def maximum(a: Any, b: Any, lanes: int) -> Any:
    """Larger of two vectors, NaN if either is; `T.max` would lose one of the two."""
    return T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.maximum", a, b)


def minimum(a: Any, b: Any, lanes: int) -> Any:
    """Smaller of two vectors, NaN if either is."""
    return T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.minimum", a, b)
