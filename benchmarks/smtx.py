"""Read the sparse matrices of the Deep Learning Matrix Collection (DLMC). NumPy only.

A file holds the places of the nonzeros, no values: ``rows, columns, nonzeros``, then where each row
begins among them, then their columns, in lines of numbers.

References
----------
T. Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020, section VII.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tvm_sparse.claims import claimed_zeros
from tvm_sparse.errors import InputError

# The group that means of these matrices are taken over.
FILE_GROUP = "dlmc"


def read_smtx(path: str | os.PathLike[str]) -> np.ndarray:
    """Return where the nonzeros are, as booleans [rows, columns].

    Raises
    ------
    InputError
        When the file cannot be read, or is none of these.
    """
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {error}") from None
    head, starts, columns = (_numbers(path, lines, line) for line in range(3))
    if len(head) != 3 or head.min() < 0:
        raise _malformed(path, "its first line is not 'rows, columns, nonzeros'")
    height, width, nnz = map(int, head)
    if len(starts) != height + 1:
        raise _malformed(path, f"{height} rows need {height + 1} offsets, and it has {len(starts)}")
    if len(columns) != nnz:
        raise _malformed(path, f"it says {nnz} nonzeros, and has {len(columns)} column indices")
    if starts[0] != 0 or starts[-1] != nnz or np.any(np.diff(starts) < 0):
        raise _malformed(path, f"its row offsets do not rise from 0 to {nnz}")
    if nnz and not 0 <= columns.min() <= columns.max() < width:
        raise _malformed(path, f"a column index is not one of {width} columns")
    try:
        mask = claimed_zeros((height, width), bool)
    except ValueError as error:
        raise _malformed(path, str(error)) from None
    mask[np.repeat(np.arange(height), np.diff(starts)), columns] = True
    if np.count_nonzero(mask) != nnz:
        raise _malformed(path, "a column index comes twice in a row")
    return mask


def _numbers(path: str | os.PathLike[str], lines: list[str], line: int) -> np.ndarray:
    words = lines[line].replace(",", " ").split() if line < len(lines) else []
    try:
        return np.array(words, dtype=np.int64)
    except (ValueError, OverflowError):
        raise _malformed(path, f"line {line + 1} holds something that is no number") from None


def _malformed(path: str | os.PathLike[str], why: str) -> InputError:
    return InputError(f"'{path}' is no matrix in the format of DLMC: {why}")
