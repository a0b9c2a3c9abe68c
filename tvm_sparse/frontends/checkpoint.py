"""What the tensors of a checkpoint mean: weights, masks, both, or something that is refused.

Tools that prune keep a weight as it is with its zeros; as the weight that was and a mask; as a mask
alone; or as its nonzeros and a map of bits. Each becomes one weight here, under the name that the
parameter had before the tool came.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..dtypes import is_float
from ..errors import ModelError
from .mask_names import is_binary, is_logit, masked_weight, plain_name
from .tensor_files import StoredTensor, open_tensors


@dataclass(frozen=True)
class Entry:
    """A weight of a checkpoint, or a mask where `is_mask` says so.

    Attributes
    ----------
    source : str
        The name of its (main) tensor in the checkpoint.
    read : callable
        Returns the value; of a mask, an array of bool that is True where the weight stays.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    is_mask: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """The floating-point weights and the masks of a checkpoint, by name.

    Attributes
    ----------
    title : str
        What messages call it.
    refused : mapping of str to str
        Why, by the name of each weight that cannot be read.
    """

    title: str
    entries: Mapping[str, Entry]
    refused: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(source: Any) -> Checkpoint:
    """Read what a checkpoint holds; values are read when they are used.

    Parameters
    ----------
    source
        As for `open_tensors`.

    Raises
    ------
    ModelError
        When it cannot be read, or its parts do not fit each other.
    """
    files = open_tensors(source)
    left = dict(files.tensors)
    refused = _quantised(left)
    entries: dict[str, Entry] = {}
    masks = _masks(left)
    for entry in [*_bitmasks(left), *_plain(left)]:
        if entry.name in entries:
            raise ModelError(
                f"{files.title} holds '{entry.name}' twice, as '{entries[entry.name].source}' and "
                f"as '{entry.source}'"
            )
        entries[entry.name] = entry
    for mask in masks:
        weight = entries.get(mask.name)
        entries[mask.name] = mask if weight is None else _masked(weight, mask)
    return Checkpoint(files.title, entries, refused)


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


def _masks(left: dict[str, StoredTensor]) -> list[Entry]:
    """Take the masks out of `left`."""
    weights = {plain_name(name) for name in left}
    found = []
    for name, tensor in list(left.items()):
        base = masked_weight(name)
        if base is None and tensor.dtype == "bool":
            # Truth values under a weight's own name can be nothing but its mask.
            base = name
        # Numbers that are called a mask may be an attention mask, which hides no parameter.
        hides = tensor.dtype == "bool" or str(base).endswith("weight") or base in weights - {name}
        if base is not None and hides:
            del left[name]
            found.append(_mask_entry(base, tensor))
    return found


def _mask_entry(base: str, tensor: StoredTensor) -> Entry:
    def read() -> np.ndarray:
        value = tensor.read()
        if is_logit(tensor.name):
            return value > 0
        if not is_binary(value):
            raise ModelError(f"the mask '{tensor.name}' holds other values than 0 and 1")
        return value.astype(bool)

    return Entry(base, tensor.name, tensor.shape, "bool", read, is_mask=True)


def _masked(weight: Entry, mask: Entry) -> Entry:
    if weight.shape != mask.shape:
        raise ModelError(
            f"the mask '{mask.source}' is {text_of(mask.shape)}, but '{weight.source}' is "
            f"{text_of(weight.shape)}"
        )

    def read() -> np.ndarray:
        value = weight.read()
        return np.where(mask.read(), value, np.zeros((), value.dtype))

    return Entry(weight.name, weight.source, weight.shape, weight.dtype, read)


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def _plain(left: Mapping[str, StoredTensor]) -> Iterable[Entry]:
    for name, tensor in left.items():
        if is_float(tensor.dtype):
            yield Entry(plain_name(name), name, tensor.shape, tensor.dtype, tensor.read)


# The parts of a tensor that compressed-tensors packs, behind a dot.
_PARTS = ("compressed", "bitmask", "shape")


def _bitmasks(left: dict[str, StoredTensor]) -> Iterable[Entry]:
    """Take nonzeros and their maps of bits out of `left` (compressed-tensors)."""
    stems = [name.removesuffix(".bitmask") for name in left if name.endswith(".bitmask")]
    for stem in stems:
        missing = [part for part in _PARTS if f"{stem}.{part}" not in left]
        if missing:
            raise ModelError(f"the packed weight '{stem}' lacks its part '{stem}.{missing[0]}'")
        values, bits, shape = (left.pop(f"{stem}.{part}") for part in _PARTS)
        left.pop(f"{stem}.row_offsets", None)
        dims = tuple(int(size) for size in shape.read().reshape(-1))
        name = _weight_of(values.name)
        yield Entry(name, values.name, dims, values.dtype, _unpacker(stem, values, bits, dims))


def _unpacker(
    stem: str, values: StoredTensor, bits: StoredTensor, dims: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        packed = bits.read().view(np.uint8)
        nonzeros = values.read().reshape(-1)
        dense = np.zeros(dims, nonzeros.dtype)
        if packed.shape != (*dims[:-1], -(-dims[-1] // 8)):
            raise ModelError(f"the bits of the packed weight '{stem}' do not fit its shape")
        places = np.unpackbits(packed, axis=-1, count=dims[-1], bitorder="little").astype(bool)
        if np.count_nonzero(places) != nonzeros.size:
            raise ModelError(
                f"the packed weight '{stem}' has {nonzeros.size} nonzeros, and bits for "
                f"{np.count_nonzero(places)}"
            )
        dense[places] = nonzeros
        return dense

    return read


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------

# What only a module with a quantised weight has (compressed-tensors; GPTQ and AWQ), and what such a
# module has beside its bias.
_QUANTISED = re.compile(r"(.*\.)?(weight_(?:packed|scale|scale_inv)|qweight)")
_OF_QUANTISED = re.compile(r"(.*\.)?(?:weight.*|\w+_scale|qweight|qzeros|scales|g_idx)")


def _quantised(left: dict[str, StoredTensor]) -> dict[str, str]:
    """Take quantised weights out of `left`, and say why."""
    refused: dict[str, str] = {}
    for name, tensor in list(left.items()):
        weight = _weight_of(name)
        if match := _QUANTISED.fullmatch(name):
            refused[f"{match[1] or ''}weight"] = f"it is quantised ('{name}' stands beside it)"
        elif tensor.dtype.startswith("F8") or (
            weight.endswith("weight") and tensor.dtype in ("int8", "int32")
        ):
            refused.setdefault(weight, f"it is quantised ('{name}' is {tensor.dtype.lower()})")
    for name in list(left):
        match = _OF_QUANTISED.fullmatch(name)
        if _weight_of(name) in refused or (match and f"{match[1] or ''}weight" in refused):
            del left[name]
    return refused


def _weight_of(name: str) -> str:
    """Name the weight that a tensor is, or is a part of."""
    stem, _, part = name.rpartition(".")
    if part not in (*_PARTS, "row_offsets"):
        return plain_name(name)
    # The 2:4 form of compressed-tensors leaves ".weight" out.
    return stem if stem.endswith("weight") else f"{stem}.weight"


def text_of(shape: Iterable[int]) -> str:
    """Write a shape as people do, for example ``64x128``."""
    return "x".join(map(str, shape)) or "a scalar"
