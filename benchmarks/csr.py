"""Sparse peers for matmuls: compressed sparse rows in MKL and in SciPy.

Both get the activations transposed, [k, n], for free, and give [m, n].
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from bars import zeros
from scipy import sparse
from timing import Call

_ROW_MAJOR, _NO_TRANSPOSE, _GENERAL = 101, 10, 20
_FULL_INDEX = 0
# What the library may spend on looking at the matrix.
_EXPECTED_CALLS = 1_000_000


@dataclass(frozen=True)
class CsrKernel:
    """A product to call, and its result as [n, m]."""

    call: Call
    nothing: Call
    y: np.ndarray
    buffers: list[np.ndarray]

    def output(self) -> np.ndarray:
        """Return the last call's result."""
        return self.y.T


class _Description(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diagonal", ctypes.c_int))


@lru_cache
def mkl() -> Any | None:
    """Load MKL, None where it is not installed."""
    found = sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
    names = [*map(str, reversed(found)), ctypes.util.find_library("mkl_rt")]
    for name in filter(None, names):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def mkl_version() -> str:
    """Return MKL's own version, empty without MKL."""
    library = mkl()
    if library is None:
        return ""
    text = ctypes.create_string_buffer(200)
    library.mkl_get_version_string(text, 199)
    return text.value.decode().strip().removeprefix("Intel(R) oneAPI Math Kernel Library ")


def mkl_csr(weight: np.ndarray, x: np.ndarray, nothing: Any) -> CsrKernel:
    """Prepare MKL's inspector-executor product: a vector's for one token, else a matrix's."""
    library, (m, k), n = mkl(), weight.shape, len(x)
    assert library is not None
    csr, right, y = sparse.csr_array(weight), _transposed(x), zeros((m, n))
    pointers = np.ascontiguousarray(csr.indptr, np.int32)
    indices = np.ascontiguousarray(csr.indices, np.int32)
    handle, description = ctypes.c_void_p(), _Description(_GENERAL, 0, 0)
    _checked(
        library.mkl_sparse_s_create_csr(
            ctypes.byref(handle),
            _FULL_INDEX,
            m,
            k,
            _address(pointers),
            _address(pointers[1:]),
            _address(indices),
            _address(csr.data),
        )
    )
    common = (_NO_TRANSPOSE, ctypes.c_float(1), handle, description)
    zero = ctypes.c_float(0)
    # The library may have no better way to offer: a hint that it refuses is no error.
    if n == 1:
        library.mkl_sparse_set_mv_hint(handle, _NO_TRANSPOSE, description, _EXPECTED_CALLS)
        product = library.mkl_sparse_s_mv
        arguments = (*common, _address(right), zero, _address(y))
    else:
        library.mkl_sparse_set_mm_hint(
            handle, _NO_TRANSPOSE, description, _ROW_MAJOR, n, _EXPECTED_CALLS
        )
        product = library.mkl_sparse_s_mm
        arguments = (*common, _ROW_MAJOR, _address(right), n, n, zero, _address(y), n)
    library.mkl_sparse_optimize(handle)
    _checked(product(*arguments))
    # MKL reads the arrays that it was given; they live as long as the kernel.
    buffers = [pointers, indices, csr.data, right, y]
    return CsrKernel(partial(product, *arguments), partial(nothing, *arguments), y, buffers)


def scipy_csr(weight: np.ndarray, x: np.ndarray) -> CsrKernel:
    """Prepare the loop inside SciPy's product, without the checks around it."""
    from scipy.sparse import _sparsetools

    (m, k), n = weight.shape, len(x)
    csr, right, y = sparse.csr_array(weight), _transposed(x), zeros((m, n))
    arrays = (csr.indptr, csr.indices, csr.data)
    flat, out = right.reshape(-1), y.reshape(-1)

    product, sizes = (_sparsetools.csr_matvec, ()) if n == 1 else (_sparsetools.csr_matvecs, (n,))

    def call() -> None:
        out.fill(0)
        product(m, k, *sizes, *arrays, flat, out)

    # One row without a nonzero.
    empty = sparse.csr_array((1, k), dtype=np.float32)
    rest = (empty.indptr, empty.indices, empty.data, flat, np.zeros(n, np.float32))
    nothing = partial(product, 1, k, *sizes, *rest)
    return CsrKernel(call, nothing, y, [*arrays, right, y])


def _transposed(x: np.ndarray) -> np.ndarray:
    right = zeros(x.shape[::-1])
    right[...] = x.T
    return right


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _checked(status: int) -> None:
    if status:
        raise RuntimeError(f"MKL refuses a sparse product (status {status})")
