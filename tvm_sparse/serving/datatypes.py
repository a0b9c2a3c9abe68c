"""Element types by the protocol's names and by NumPy's."""

from __future__ import annotations

import numpy as np

from ..dtypes import numpy_dtype

# Of the protocol's types only BYTES, strings, has none of a tensor.
DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BF16": "bfloat16",
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


def datatype_of(dtype: str) -> str:
    """Return the protocol's name of an element type that a manifest names."""
    return _NAMES[dtype]


def element_type(datatype: str) -> np.dtype:
    """Return the protocol's type as NumPy has it, in the byte order of the wire."""
    dtype = numpy_dtype(DATATYPES[datatype])
    return dtype if datatype == "BF16" else dtype.newbyteorder("<")


def json_kinds(datatype: str) -> frozenset[type]:
    """Return which of Python's types the elements of a tensor in JSON may have."""
    if datatype == "BOOL":
        return frozenset({bool})
    return frozenset({int} if "INT" in datatype else {int, float})
